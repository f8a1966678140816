"""Work items of one step's attention: made once per step and KV group, used by all its layers.

An item is one kv head and a few query tokens that read the same keys: tokens of one sequence, or
of several sequences whose tables begin with the same blocks (a shared prompt). The shared keys are
then loaded once for all of them, which turns decoding over a long common prompt from a memory-bound
into a compute-bound task. Sources: Hydragen (arXiv:2402.05099), ChunkAttention (arXiv:2402.15220);
they merge partial results, here every row keeps its own order of operations, so no bit changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from batchwright.request import Int32Array

MAX_ROWS = 48
"""Query rows (tokens x heads of a group) that share the loaded keys and values of one item."""

TILE = 128
"""Keys of one softmax update. Part of the arithmetic: changing it changes results by rounding."""

ALL_KEYS = 2**31 - 1


class AttentionPlan(NamedTuple):
    """Who attends to what in one step. All int32, C-contiguous.

    Query tokens are listed in the order of the items that hold them.

    Attributes:
        items: [num_items, 4] (kv head, first entry, end entry, shared keys), dearest first. All
            entries of an item read keys [0, shared) from the same blocks; shared is a multiple of
            TILE, or ALL_KEYS if the entries are of one sequence.
        tokens: [num_tokens] query token of each entry.
        slots: [num_tokens] its line in the block table.
        key_start, key_end: [num_tokens] sequence positions [start, end) that it attends to.
        num_pairs: (token, key, kv head) triples of the step, its amount of work.
    """

    items: Int32Array
    tokens: Int32Array
    slots: Int32Array
    key_start: Int32Array
    key_end: Int32Array
    num_pairs: int


def plan_attention(
    cu_seqlens_q: Int32Array,
    row_slots: Int32Array,
    positions: Int32Array,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    window: int | None = None,
    block_table: Int32Array | None = None,
    block_size: int = 0,
) -> AttentionPlan:
    """Cut a step into items and sort them by cost.

    Args:
        cu_seqlens_q: [num_rows + 1] int32, row r owns query tokens [cu[r], cu[r + 1]).
        row_slots: [num_rows] int32, the row's line in the block table.
        positions: [num_tokens] int32, position of each query token in its sequence.
        window: a token attends to its last `window` keys, itself included; None: to all.
        block_table, block_size: the table that this step will use, [max_slots, max_blocks] int32,
            if rows may share leading blocks; None: every row loads its own keys. Ignored with a
            window, whose freed blocks have no valid ids to compare.

    Which tokens share an item changes the cost of a result, never its bits.
    """
    key_end = positions + np.int32(1)
    if window is None:
        key_start = np.zeros_like(positions)
    else:
        key_start = np.maximum(key_end - np.int32(window), np.int32(0))
    if block_table is None or window is not None or len(row_slots) < 2 or not len(positions):
        order = np.arange(len(row_slots))
        shared = np.zeros(len(row_slots), np.int64)
    else:
        order = _order_by_blocks(block_table, row_slots, -(-int(key_end.max()) // block_size))
        shared = _shared_keys(cu_seqlens_q, row_slots, key_end, block_table, block_size, order)
    items, costs, tokens, slots = _cut(
        cu_seqlens_q,
        row_slots,
        key_end - key_start,
        order,
        shared,
        num_kv_heads,
        tokens_per_item(num_q_heads, num_kv_heads),
    )
    dearest_first = np.argsort(-costs, kind="stable")
    return AttentionPlan(
        items[dearest_first],
        tokens,
        slots,
        key_start[tokens],
        key_end[tokens],
        int(costs.sum()),
    )


def tokens_per_item(num_q_heads: int, num_kv_heads: int) -> int:
    """Query tokens that share the loaded keys of one item, at most."""
    return max(1, MAX_ROWS // (num_q_heads // num_kv_heads))


def _order_by_blocks(
    block_table: Int32Array, row_slots: Int32Array, num_blocks: int
) -> npt.NDArray[np.int64]:
    """Rows in lexicographic order of their tables: rows with a common beginning are neighbours."""
    lines = np.ascontiguousarray(block_table[row_slots, : max(1, num_blocks)])
    return np.argsort(lines.view(np.dtype((np.void, lines.shape[1] * 4)))[:, 0], kind="stable")


@njit(cache=True)
def _shared_keys(
    cu_seqlens_q: Any,
    row_slots: Any,
    key_end: Any,
    block_table: Any,
    block_size: int,
    order: Any,
) -> Any:
    """[num_rows]: leading keys, in whole tiles, that row order[i] and row order[i + 1] share."""
    shared = np.zeros(len(order), np.int64)
    for i in range(len(order) - 1):
        limit = block_table.shape[1] * block_size
        for row in (order[i], order[i + 1]):
            for token in range(cu_seqlens_q[row], cu_seqlens_q[row + 1]):
                limit = min(limit, key_end[token])
        a, b = row_slots[order[i]], row_slots[order[i + 1]]
        block = 0
        while block < limit // block_size and block_table[a, block] == block_table[b, block]:
            block += 1
        shared[i] = block * block_size // TILE * TILE
    return shared


@njit(cache=True)
def _cut(
    cu_seqlens_q: Any,
    row_slots: Any,
    num_keys: Any,
    order: Any,
    shared: Any,
    num_kv_heads: int,
    tokens_per_item: int,
) -> Any:
    """(items, their costs, tokens and slots in the order of entries)."""
    items = np.empty(((len(num_keys)) * num_kv_heads, 4), np.int32)
    costs = np.empty(len(items), np.int64)
    tokens, slots = np.empty(len(num_keys), np.int32), np.empty(len(num_keys), np.int32)
    num_items = entry = row = 0
    while row < len(order):
        end_row, keys = _group(cu_seqlens_q, order, shared, row, tokens_per_item)
        first = entry
        for i in range(row, end_row):
            for token in range(cu_seqlens_q[order[i]], cu_seqlens_q[order[i] + 1]):
                tokens[entry], slots[entry] = token, row_slots[order[i]]
                entry += 1
        for start in range(first, entry, tokens_per_item):
            end = min(start + tokens_per_item, entry)
            cost = 0
            for i in range(start, end):
                cost += num_keys[tokens[i]]
            for head in range(num_kv_heads):
                item = items[num_items]
                item[0], item[1], item[2], item[3] = head, start, end, keys
                costs[num_items] = cost
                num_items += 1
        row = end_row
    return items[:num_items], costs[:num_items], tokens, slots


@njit(cache=True)
def _group(
    cu_seqlens_q: Any, order: Any, shared: Any, first: int, tokens_per_item: int
) -> tuple[int, int]:
    """(end row, shared keys) of the rows from `first` on that make one item.

    A row joins if it fits and if n rows reading their own keys beyond the shorter prefix cost less
    than starting over; not if it shares more with the row after it, a deeper branch of the tree.
    """
    tokens = cu_seqlens_q[order[first] + 1] - cu_seqlens_q[order[first]]
    keys = ALL_KEYS
    end = first + 1
    while end < len(order):
        tokens += cu_seqlens_q[order[end] + 1] - cu_seqlens_q[order[end]]
        common = min(keys, shared[end - 1])
        if tokens > tokens_per_item or common == 0:
            break
        if keys != ALL_KEYS and (end - first) * (keys - common) >= keys:
            break
        if common < keys and shared[end] > common:
            break
        keys = common
        end += 1
    return end, keys
