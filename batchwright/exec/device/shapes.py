"""Sizes of captured graphs, and how a step is filled up to one of them."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from batchwright.attention.device import RowBatch
from batchwright.request import Int32Array
from batchwright.step import NO_WRITE, Step

MAX_GRAPH_TOKENS = 512
"""Larger steps are not captured: the device takes longer for them than the host for launching."""


def graph_tokens(limit: int) -> list[int]:
    """Numbers of tokens that graphs are captured for, ascending; the last is at least `limit`.

    A product costs the same for all rows of a tile (docs/gpu.md: 64 or 128 rows), so there is
    little to win by finer sizes, but attention and norms grow with every row.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, limit + 64, 64)]
    return sizes[: bisect_left(sizes, limit) + 1]


def padded_rows(step: Step, num_tokens: int, no_slot: int) -> RowBatch:
    """The step's rows, then one row for each token that fills it up, which sees nothing."""
    missing = num_tokens - step.num_tokens
    if not missing:
        return RowBatch(step.slots, step.cu_seqlens_q, step.positions)
    return RowBatch(
        filled(step.slots, step.num_rows + missing, no_slot),
        np.concatenate((step.cu_seqlens_q, np.arange(step.num_tokens + 1, num_tokens + 1))).astype(
            np.int32
        ),
        filled(step.positions, num_tokens, -1),
    )


def filled(array: Int32Array, length: int, value: int) -> Int32Array:
    """An int32 array made longer."""
    longer = np.full(length, value, np.int32)
    longer[: len(array)] = array
    return longer


def token_arrays(step: Step, rows: RowBatch, no_slot: int) -> dict[str, Int32Array]:
    """What the model is told of each token, filled up; nothing is written for what fills up."""
    num_tokens = len(rows.positions)
    position_ids = step.positions if step.position_ids is None else step.position_ids
    token_slots = np.repeat(step.slots, np.diff(step.cu_seqlens_q))
    arrays = {
        "token_ids": filled(step.token_ids, num_tokens, 0),
        "token_slots": filled(token_slots, num_tokens, no_slot),
        "position_ids": filled(position_ids, num_tokens, 0),
    }
    for group, kv_slots in enumerate(step.kv_slots):
        arrays[f"kv_slots.{group}"] = filled(kv_slots, num_tokens, NO_WRITE)
    return arrays
