"""How much of each prompt earlier rows have computed already, for all rows of a job at once.

Rows are followed down the tree of their prompts one block at a time: rows of one group have had
equal blocks so far, and the next block divides them further. A row that is alone in its group is
done, so the work is that of the shared part of the prompts. Nothing is done per token in Python.

The engine knows the rows within its horizon, and gives a block up when the last of them that wants
it has started. So a row shares a block with the row before it that has it, if that is no further
back than the horizon.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchwright.request import Int32Array

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]

CHUNK_ROWS = 65_536
"""Rows whose blocks are gathered at once: 16 MiB of them at 32 tokens a block."""


def shared_blocks(
    tokens: Int32Array,
    starts: Int64Array,
    num_blocks: Int64Array,
    num_kept: Int64Array,
    *,
    block_size: int,
    horizon: int | None = None,
    places: Int64Array | None = None,
) -> Int64Array:
    """Leading blocks of each prompt that a row before it has too.

    Args:
        tokens: of all prompts.
        starts: [num_rows] where each prompt begins in `tokens`.
        num_blocks: [num_rows] whole blocks of each prompt.
        num_kept: [num_rows] those of them that the row computes wholly, so that later rows can
            have them; the last block of a score may lack its last token.
        horizon: how far back the other row may be; None: anywhere before.
        places: [num_rows] ascending, where rows stand in the job; by default one after the other.
    Returns:
        [num_rows]

    Blocks are compared by 64-bit hashes with fresh random factors.
    """
    if places is None:
        places = np.arange(len(starts))
    factors = np.random.default_rng().integers(0, 2**63, block_size, np.uint64) * 2 + 1
    shared = np.zeros(len(starts), np.int64)
    rows: Int64Array = np.flatnonzero(num_blocks > 0)
    group: Int64Array = np.zeros(len(rows), np.int64)
    depth = 0
    while len(rows):
        keys = _hashes(tokens, starts[rows] + depth * block_size, factors)
        keys ^= group.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        order = np.argsort(keys, kind="stable")  # rows of a group stay in their order
        follows = np.zeros(len(rows), np.bool_)  # in `order`: the same group as the one before
        follows[1:] = keys[order[1:]] == keys[order[:-1]]
        sorted_rows = rows[order]
        source = _last_before(num_kept[sorted_rows] > depth, ~follows)
        gaps = places[sorted_rows] - places[sorted_rows[source]]
        is_near = source >= 0 if horizon is None else (source >= 0) & (gaps <= horizon)
        shared[sorted_rows[is_near]] += 1
        has_company = follows.copy()
        has_company[:-1] |= follows[1:]
        depth += 1
        goes_on = has_company & (num_blocks[sorted_rows] > depth)
        new_group = np.cumsum(~follows, dtype=np.int64)
        rows, group = sorted_rows[goes_on], new_group[goes_on]
        in_order = np.argsort(rows)
        rows, group = rows[in_order], group[in_order]
    return shared


def _last_before(keeps: BoolArray, begins: BoolArray) -> Int64Array:
    """[n] for each line the last one before it, in its group, that keeps the block; -1: none."""
    lines = np.arange(len(keeps))
    last = np.maximum.accumulate(np.where(keeps, lines, -1))
    before = np.concatenate(([-1], last[:-1]))
    return np.where(before >= np.maximum.accumulate(np.where(begins, lines, 0)), before, -1)


def _hashes(tokens: Int32Array, starts: Int64Array, factors: UInt64Array) -> UInt64Array:
    """[num_rows] of the block that begins at each start."""
    columns = np.arange(len(factors))
    hashes = np.empty(len(starts), np.uint64)
    for first in range(0, len(starts), CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        blocks = tokens[starts[part, None] + columns].astype(np.uint64)
        hashes[part] = blocks @ factors
    return hashes
