"""Work items of one step's attention on a GPU: made once per step and KV group, used by all layers.

An item is a few query tokens and a range of keys that one block table leads to. A long range is cut
into pieces, so that a few long sequences fill the card as well as many short ones (Flash-Decoding);
keys that several rows share are an item of their own whose tokens come from all of them (Hydragen,
arXiv:2402.05099), on every level of the prefix tree. A token whose keys lie in several items gets a
partial result from each, which a second kernel merges by log-sum-exp. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.kernels.paged_attention.shared_nodes import SharedNode
from batchwright.kernels.paged_attention.tiling import KEY_GRANULE, Tiling
from batchwright.request import Int32Array

Int64Array = npt.NDArray[np.int64]

ITEM_FIELDS = 8
DIRECT = -1
MIN_PIECE_KEYS = 256
"""A range is not cut into pieces shorter than this: starting a program costs as much."""


PROGRAMS_PER_MULTIPROCESSOR = (8, 2)
"""What num_programs should be, narrow and wide, times the multiprocessors of the card.

On an H200 (bf16, 32 query heads, 8 kv heads of 128) decoding of 8 rows of 16,384 keys took 132 us
with 8, and with an earlier shape 140 us, uncut 221; 16 and more were slower for many rows. Wide
ranges are long work by themselves: 64 rows with 8,192 shared keys took 45 us with 2, 55 with 1, 60
with 4. Steps that have enough wide ranges uncut were no slower with 1, or faster; see _cut.
"""


class WorkList(NamedTuple):
    """Who attends to what. All int32, C-contiguous.

    Attributes:
        narrow, wide: [n, 8] items for the two tile shapes, dearest first: (first entry, number of
            entries, line of the block table, first key, end key, end of the keys that every entry
            sees, piece or DIRECT, 0). An item of 0 entries does nothing.
        entry_tokens: [num_entries] query token of each entry.
        key_start, key_end: [num_tokens] positions [start, end) that a token attends to.
        partial_start: [num_tokens] where a token's partial results begin; piece p is p further.
        num_partials: [num_tokens] pieces of a token.
        merged_tokens: [num_merged] tokens of more than one piece.
        total_partials: partial results of the step.
        max_partials: the most that one token has.
    """

    narrow: Int32Array
    wide: Int32Array
    entry_tokens: Int32Array
    key_start: Int32Array
    key_end: Int32Array
    partial_start: Int32Array
    num_partials: Int32Array
    merged_tokens: Int32Array
    total_partials: int
    max_partials: int


class _Ranges(NamedTuple):
    """Entries [first, first + count) and the keys [begin, end) they read; one element each."""

    first: Int64Array
    count: Int64Array
    slot: Int64Array
    begin: Int64Array
    end: Int64Array
    full_end: Int64Array
    is_wide: npt.NDArray[np.bool_]


def plan_work(
    cu_seqlens_q: Int32Array,
    row_slots: Int32Array,
    positions: Int32Array,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    tiling: Tiling,
    num_programs: tuple[int, int],
    window: int | None = None,
    nodes: Sequence[SharedNode] = (),
) -> WorkList:
    """Cut a step into items.

    Args:
        cu_seqlens_q: [num_rows + 1] int32, row r owns query tokens [cu[r], cu[r + 1]).
        row_slots: [num_rows] int32, the row's line in the block table.
        positions: [num_tokens] int32, position of each query token in its sequence; it sees keys
            at positions up to its own. -1: no keys.
        tiling: shapes that the kernel will be run with.
        num_programs: ranges are cut so that the narrow and the wide shape get about this many
            programs each; see PROGRAMS_PER_MULTIPROCESSOR. Where wide ranges make three quarters of
            it uncut, they are cut for half of it only. 0: ranges are never cut.
        window: a token attends to its last `window` keys, itself included; None: to all.
        nodes: shared keys to compute once for all their rows, ancestors first; see shared_nodes.py.
            Must be empty with a window.
    """
    group_size = num_q_heads // num_kv_heads
    narrow_tokens = tiling.narrow.num_rows // group_size
    wide_tokens = tiling.wide.num_rows // group_size
    assert window is None or not nodes
    key_end = positions + np.int32(1)
    key_start = np.zeros_like(key_end) if window is None else np.maximum(key_end - window, 0)
    counts = np.diff(cu_seqlens_q).astype(np.int64)

    covered = np.zeros(len(counts), np.int64)  # keys of a row that nodes have taken over
    for node in nodes:
        covered[node.rows] = node.end
    own = _own_ranges(
        cu_seqlens_q, counts, row_slots, key_start, key_end, covered, narrow_tokens, wide_tokens,
        window,
    )  # fmt: skip
    shared, node_of, node_tokens = _node_ranges(
        cu_seqlens_q, counts, row_slots, nodes, len(positions), narrow_tokens, wide_tokens
    )
    ranges = _Ranges(*(np.concatenate(pair) for pair in zip(own, shared, strict=True)))

    pieces, piece_keys = _cut(ranges, num_kv_heads, num_programs)
    # Pieces are numbered down the tree: a node's come after its ancestors', a row's own come last.
    num_own = len(own.first)
    row_base = np.zeros(len(counts), np.int64)
    base = np.zeros(len(pieces), np.int64)
    for i, node in enumerate(nodes):
        mine = num_own + np.flatnonzero(node_of == i)
        if len(mine):
            base[mine] = row_base[node.rows[0]]
            row_base[node.rows] += pieces[mine[0]]
    row_of_token = np.repeat(np.arange(len(counts)), counts)
    base[:num_own] = row_base[row_of_token[own.first]]
    num_partials = row_base[row_of_token] + np.repeat(pieces[:num_own], own.count)

    is_merged = num_partials > 1
    partial_start = np.cumsum(np.where(is_merged, num_partials, 0)) - num_partials * is_merged
    direct = np.zeros(len(pieces), np.bool_)
    direct[:num_own] = ~is_merged[own.first]
    items, keys = _expand(ranges, pieces, piece_keys, base, direct)
    wide = np.repeat(ranges.is_wide, pieces)
    return WorkList(
        _dearest_first(items[~wide], keys[~wide]),
        _dearest_first(items[wide], keys[wide]),
        np.concatenate([np.arange(len(positions)), *node_tokens]).astype(np.int32),
        key_start.astype(np.int32),
        key_end.astype(np.int32),
        partial_start.astype(np.int32),
        num_partials.astype(np.int32),
        np.flatnonzero(is_merged).astype(np.int32),
        int(num_partials[is_merged].sum()),
        int(num_partials.max(initial=0)),
    )


def _own_ranges(
    cu_seqlens_q: Int32Array,
    counts: Int64Array,
    row_slots: Int32Array,
    key_start: Int32Array,
    key_end: Int32Array,
    covered: Int64Array,
    narrow_tokens: int,
    wide_tokens: int,
    window: int | None,
) -> _Ranges:
    """Each row's tokens in tiles, over the keys that no node has taken."""
    is_wide = counts > narrow_tokens
    per_tile = np.where(is_wide, wide_tokens, narrow_tokens)
    tiles = -(-counts // per_tile)
    row = np.repeat(np.arange(len(counts)), tiles)
    first = cu_seqlens_q[row] + _count_up(tiles) * per_tile[row]
    count = np.minimum(per_tile[row], cu_seqlens_q[row + 1] - first)
    if not len(row):
        none = np.zeros(0, np.int64)
        return _Ranges(none, none, none, none, none, none, none.astype(np.bool_))
    begin = covered[row]
    end = np.maximum.reduceat(key_end, first).astype(np.int64)
    full_end = np.maximum(np.minimum.reduceat(key_end, first), begin)
    if window is not None:  # a key too old for one token may be seen by the one before
        begin = np.minimum.reduceat(key_start, first) // KEY_GRANULE * KEY_GRANULE
        full_end = begin
    return _Ranges(
        first.astype(np.int64),
        count.astype(np.int64),
        row_slots[row].astype(np.int64),
        begin.astype(np.int64),
        np.maximum(end, begin),
        full_end.astype(np.int64),
        is_wide[row],
    )


def _node_ranges(
    cu_seqlens_q: Int32Array,
    counts: Int64Array,
    row_slots: Int32Array,
    nodes: Sequence[SharedNode],
    first_entry: int,
    narrow_tokens: int,
    wide_tokens: int,
) -> tuple[_Ranges, Int64Array, list[Int64Array]]:
    """Tiles of the tokens of each node's rows; the node of each tile; the tokens, as entries."""
    parts: list[tuple[Int64Array, Int64Array, int, bool]] = []
    tokens: list[Int64Array] = []
    for i, node in enumerate(nodes):
        mine = np.repeat(cu_seqlens_q[node.rows].astype(np.int64), counts[node.rows])
        tokens.append(mine + _count_up(counts[node.rows]))
        is_wide = len(mine) > narrow_tokens
        per_tile = wide_tokens if is_wide else narrow_tokens
        start = np.arange(0, len(mine), per_tile, dtype=np.int64)
        parts.append((first_entry + start, np.minimum(per_tile, len(mine) - start), i, is_wide))
        first_entry += len(mine)
    tiles = [len(first) for first, _, _, _ in parts]
    node_of = np.repeat(np.arange(len(nodes)), np.array(tiles, np.int64))
    end = np.array([node.end for node in nodes], np.int64)[node_of]
    ranges = _Ranges(
        np.concatenate([np.zeros(0, np.int64), *(first for first, _, _, _ in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(count for _, count, _, _ in parts)]),
        np.array([row_slots[node.rows[0]] for node in nodes], np.int64)[node_of],
        np.array([node.begin for node in nodes], np.int64)[node_of],
        end,
        end,
        np.array([is_wide for _, _, _, is_wide in parts], np.bool_)[node_of],
    )
    return ranges, node_of, tokens


def _cut(
    ranges: _Ranges, num_kv_heads: int, num_programs: tuple[int, int]
) -> tuple[Int64Array, Int64Array]:
    """(pieces of each range, keys of a piece): about `num_programs` of narrow and wide pieces."""
    keys = ranges.end - ranges.begin
    pieces = np.ones(len(keys), np.int64)
    for is_wide, number in zip((False, True), num_programs, strict=True):
        if number:
            mine = ranges.is_wide == is_wide
            # Of so many ranges, two pieces each would not leave the busiest multiprocessor less,
            # and need a merge: on an H200 a lone prompt of 512 tokens took 26 us so, uncut 15.
            if is_wide and 4 * int(mine.sum()) * num_kv_heads >= 3 * number:
                number = max(1, number // 2)
            target = max(MIN_PIECE_KEYS, int(keys[mine].sum()) * num_kv_heads // number)
            pieces[mine] = np.maximum(1, -(-keys[mine] // target))
    piece_keys = -(-keys // (pieces * KEY_GRANULE)) * KEY_GRANULE
    piece_keys = np.maximum(piece_keys, KEY_GRANULE)
    return np.maximum(1, -(-keys // piece_keys)), piece_keys


def _expand(
    ranges: _Ranges,
    pieces: Int64Array,
    piece_keys: Int64Array,
    base: Int64Array,
    direct: npt.NDArray[np.bool_],
) -> tuple[Int32Array, Int64Array]:
    """(items of all pieces, keys of each)."""
    of, piece = np.repeat(np.arange(len(pieces)), pieces), _count_up(pieces)
    begin = ranges.begin[of] + piece * piece_keys[of]
    end = np.minimum(begin + piece_keys[of], ranges.end[of])
    items = np.zeros((len(of), ITEM_FIELDS), np.int32)
    items[:, 0], items[:, 1], items[:, 2] = ranges.first[of], ranges.count[of], ranges.slot[of]
    items[:, 3], items[:, 4] = begin, end
    items[:, 5] = np.clip(ranges.full_end[of], begin, end)
    items[:, 6] = np.where(direct[of], DIRECT, base[of] + piece)
    return items, end - begin


def _dearest_first(items: Int32Array, keys: Int64Array) -> Int32Array:
    return np.ascontiguousarray(items[np.argsort(-keys, kind="stable")])


def _count_up(counts: Int64Array) -> Int64Array:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ..."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
