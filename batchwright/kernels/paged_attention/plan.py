"""Work items of one step's attention: made once per step and KV group, used by all its layers.

An item is one kv head and a few query tokens: of one sequence, or of several whose tables begin
with the same blocks (a shared prompt). The tables, sorted, are a tree, and each node of it is a
segment of keys that is loaded once for all tokens of the item below it, which turns decoding over
a long common prompt from a memory-bound into a compute-bound task. Sources: Hydragen
(arXiv:2402.05099), ChunkAttention (arXiv:2402.15220); they merge partial results, here a row goes
through its segments from the root on in its own order of operations, so no bit changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from batchwright.kernels import get_num_threads
from batchwright.request import Int32Array

MAX_ROWS = 96
"""Most query rows (tokens x heads of a group) that share the loaded keys and values of one item."""

FEW_ROWS = 24
"""Items are cut to this, if need be, until every thread has some: products are still fast."""

ITEMS_PER_THREAD = 4
"""Aimed at: with few large items a thread would wait for the last one of another."""

TILE = 128
"""Keys of one softmax update. Part of the arithmetic: changing it changes results by rounding."""

ALL_KEYS = 2**31 - 1


class AttentionPlan(NamedTuple):
    """Who attends to what in one step. All int32, C-contiguous.

    Query tokens are listed in the order of the items that hold them.

    Attributes:
        items: [num_items, 5] (kv head, first entry, end entry, first segment, end segment),
            dearest first; after those there may be some without entries.
        segments: [num_segments, 4] (first entry, end entry, first key, end key). Keys of these
            positions are in the same blocks for all its entries. An entry's segments ascend and
            cover all its keys; they begin and end at multiples of TILE, or end with ALL_KEYS.
        tokens: [num_tokens] query token of each entry.
        slots: [num_tokens] its line in the block table.
        key_start, key_end: [num_tokens] sequence positions [start, end) that it attends to.
        num_pairs: (token, key, kv head) triples of the step, its amount of work.
    """

    items: Int32Array
    segments: Int32Array
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
        order, shared = sort_rows(cu_seqlens_q, row_slots, positions, block_table, block_size)
    items, segments, costs, tokens, slots = _cut(
        cu_seqlens_q,
        row_slots,
        key_end - key_start,
        order,
        shared,
        num_kv_heads,
        _tokens_per_item(len(positions), num_q_heads, num_kv_heads),
    )
    dearest_first = np.argsort(-costs, kind="stable")
    return AttentionPlan(
        items[dearest_first],
        segments,
        tokens,
        slots,
        key_start[tokens],
        key_end[tokens],
        int(costs.sum()),
    )


class LastingPlan:
    """A plan in memory that keeps its place, for steps of as many tokens.

    Attributes:
        plan: arrays as long as any such step needs. Items behind its last one have no entries;
            num_pairs is large, since any step may follow.
    """

    def __init__(self, plan: AttentionPlan, num_kv_heads: int) -> None:
        num_tokens = len(plan.tokens)
        self.plan = AttentionPlan(
            np.zeros((num_tokens * num_kv_heads, 5), np.int32),
            np.zeros((2 * num_tokens, 4), np.int32),
            np.zeros(num_tokens, np.int32),
            np.zeros(num_tokens, np.int32),
            np.zeros(num_tokens, np.int32),
            np.zeros(num_tokens, np.int32),
            2**31,
        )
        self.take_over(plan)

    def take_over(self, plan: AttentionPlan) -> None:
        """Become the plan of another step."""
        lasting: list[Int32Array] = list(self.plan[:-1])
        for array, new in zip(lasting, plan[:-1], strict=True):
            array[: len(new)] = new
        self.plan.items[len(plan.items) :] = 0


def tokens_per_item(num_q_heads: int, num_kv_heads: int) -> int:
    """Query tokens that share the loaded keys of one item, at most."""
    return max(1, MAX_ROWS // (num_q_heads // num_kv_heads))


def sort_rows(
    cu_seqlens_q: Int32Array,
    row_slots: Int32Array,
    positions: Int32Array,
    block_table: Int32Array,
    block_size: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows that have tokens, so that those with a common beginning are neighbours.

    Returns:
        (order [num], shared [num]): shared[i] leading keys, in whole tiles, are in the
        same blocks for rows order[i] and order[i + 1] and before all their query tokens.
    """
    key_end = positions + np.int32(1)
    rows = np.flatnonzero(np.diff(cu_seqlens_q))
    num_blocks = -(-int(key_end.max()) // block_size)
    order = rows[_order_by_blocks(block_table, row_slots[rows], num_blocks)]
    return order, _shared_keys(cu_seqlens_q, row_slots, key_end, block_table, block_size, order)


def distinct_keys(
    cu_seqlens_q: Int32Array,
    row_slots: Int32Array,
    positions: Int32Array,
    block_table: Int32Array,
    block_size: int,
) -> int:
    """Keys that a step without windows needs for each kv head, shared ones once: what it may cost.

    The nodes of a tree hold what its sorted rows hold, less what neighbours share. A step loads
    more, `loaded_keys`, where the rows of a node are too many for one item.
    """
    if not len(positions):
        return 0
    _, shared = sort_rows(cu_seqlens_q, row_slots, positions, block_table, block_size)
    first_tokens = cu_seqlens_q[:-1][np.diff(cu_seqlens_q) > 0]
    ends = np.maximum.reduceat(positions, first_tokens).astype(np.int64) + 1
    return int(ends.sum() - shared.sum())


def loaded_keys(plan: AttentionPlan) -> int:
    """Keys that a step loads for each kv head; a value comes with each key.

    Less than what its tokens see: for one item of rows of lengths L over a common prefix of P keys
    it is P + sum(L - P), and over a tree the keys of its nodes, each once.
    """
    of_first_head = plan.items[plan.items[:, 0] == 0]
    total = 0
    for first_segment, end_segment in of_first_head[:, 3:].tolist():
        for first, end, first_key, end_key in plan.segments[first_segment:end_segment].tolist():
            begin = max(first_key, int(plan.key_start[first:end].min()))
            total += max(0, min(end_key, int(plan.key_end[first:end].max())) - begin)
    return total


def _tokens_per_item(num_tokens: int, num_q_heads: int, num_kv_heads: int) -> int:
    """Most tokens that share keys, so that items are large but enough for all threads."""
    rows_per_item = num_tokens * num_q_heads // (ITEMS_PER_THREAD * get_num_threads())
    rows = min(max(rows_per_item, FEW_ROWS), MAX_ROWS)
    return max(1, rows // (num_q_heads // num_kv_heads))


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
    """(items, segments, the items' costs, tokens and slots in the order of entries)."""
    items = np.empty((len(num_keys) * num_kv_heads, 5), np.int32)
    segments = np.empty((2 * len(num_keys), 4), np.int32)
    costs = np.empty(len(items), np.int64)
    tokens, slots = np.empty(len(num_keys), np.int32), np.empty(len(num_keys), np.int32)
    entries = np.zeros(len(order) + 1, np.int64)  # of row order[i]: from entries[i] on
    for i in range(len(order)):
        at = entries[i]
        for token in range(cu_seqlens_q[order[i]], cu_seqlens_q[order[i] + 1]):
            tokens[at], slots[at] = token, row_slots[order[i]]
            at += 1
        entries[i + 1] = at
    num_items = num_segments = row = 0
    while row < len(order):
        end_row = _end_of_group(entries, shared, row, tokens_per_item)
        for start in range(entries[row], entries[end_row], tokens_per_item):
            end = min(start + tokens_per_item, entries[end_row])
            first_segment = num_segments
            if end_row - row > 1:  # all rows of a group are in one item
                num_segments = _add_segments(segments, num_segments, entries, shared, row, end_row)
            else:
                segment = segments[num_segments]
                segment[0], segment[1], segment[2], segment[3] = start, end, 0, ALL_KEYS
                num_segments += 1
            cost = 0
            for i in range(start, end):
                cost += num_keys[tokens[i]]
            for head in range(num_kv_heads):
                item = items[num_items]
                item[0], item[1], item[2] = head, start, end
                item[3], item[4] = first_segment, num_segments
                costs[num_items] = cost
                num_items += 1
        row = end_row
    return items[:num_items], segments[:num_segments], costs[:num_items], tokens, slots


@njit(cache=True)
def _end_of_group(entries: Any, shared: Any, first: int, tokens_per_item: int) -> int:
    """End of the rows from `first` on that make one item: neighbours that share keys and fit.

    If more would share, the cut is where neighbours share least: the second half of the rows that
    fit is free to go to the next item, which loads what is common to both again.
    """
    end = first + 1
    while end <= len(shared) - 1 and shared[end - 1] > 0:
        if entries[end + 1] - entries[first] > tokens_per_item:
            best = end
            for cut in range(end - 1, first + (end - first) // 2, -1):
                if shared[cut - 1] < shared[best - 1]:
                    best = cut
            return best
        end += 1
    return end


@njit(cache=True)
def _add_segments(
    segments: Any, num_segments: int, entries: Any, shared: Any, first: int, end: int
) -> int:
    """Segments of the tree of rows [first, end), a node before its children; the new number."""
    # Ranges of rows whose keys from `start` on are open. A range is split where its rows share
    # least, so there are never more of them than rows.
    stack = np.empty((end - first, 3), np.int64)
    stack[0, 0], stack[0, 1], stack[0, 2] = first, end, 0
    depth = 1
    while depth:
        depth -= 1
        begin, stop, start = stack[depth, 0], stack[depth, 1], stack[depth, 2]
        common = np.int64(ALL_KEYS)
        for row in range(begin, stop - 1):
            common = min(common, shared[row])
        if common > start:
            segment = segments[num_segments]
            segment[0], segment[1] = entries[begin], entries[stop]
            segment[2], segment[3] = start, common
            num_segments += 1
        if stop - begin == 1:
            continue
        child = begin
        for row in range(begin, stop):
            if row == stop - 1 or shared[row] == common:
                stack[depth, 0], stack[depth, 1], stack[depth, 2] = child, row + 1, common
                depth += 1
                child = row + 1
    return num_segments
