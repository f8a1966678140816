"""Attention of one item: a kv head and a few query tokens.

Query rows (tokens x heads of the group) of a segment share every key and value that is loaded. Keys
are taken in tiles of 128 aligned to the position in the sequence: scores of the tile, the softmax
step, then o += weights @ values. Scores are in units of log2, so that exp is exp2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import njit

from batchwright.kernels.aligned import CACHE_LINE_BYTES
from batchwright.kernels.fma_tile import fma_tile, load_wide
from batchwright.kernels.paged_attention.layout import KEYS_PER_VECTOR_TILE as SUB
from batchwright.kernels.paged_attention.online_softmax import RowState, weigh_tile
from batchwright.kernels.paged_attention.plan import TILE, AttentionPlan
from batchwright.kernels.simd import (
    LANES,
    div,
    horizontal_sum,
    load,
    load_many,
    mul,
    prefetch,
    store,
)

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
F32 = np.float32
FEW_ROWS = 16
"""Up to so many query rows make narrow keys and values fp32 as they use them, tile by tile; for
more it is done once."""
MANY_REGISTERS = get_host_cpu_features().get("avx512vl", False)
"""32 vector registers, so tiles of eight rows; with the 16 of AVX2 two or three rows are best."""


@njit(error_model="numpy")
def attend_item(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    plan: AttentionPlan,
    item: int,
    scale: float,
    soft_cap: float,
    sinks: Any,
    out: Any,
    lse: Any,
    state: RowState,
) -> None:
    """Write out and lse of the item's tokens and heads; `state` is scratch."""
    head, first = np.int64(plan.items[item, 0]), np.int64(plan.items[item, 1])
    end = np.int64(plan.items[item, 2])
    group = q.shape[1] // k_cache.shape[1]
    _begin(q, plan, first, end, head * group, group, scale, soft_cap, sinks, state)
    # Segments begin at multiples of the tile, so a row goes through the same tiles in the same
    # order whatever it shares.
    for i in range(plan.items[item, 3], plan.items[item, 4]):
        start, stop = np.int64(plan.segments[i, 0]), np.int64(plan.segments[i, 1])
        first_key, end_key = np.int64(plan.segments[i, 2]), np.int64(plan.segments[i, 3])
        _attend_keys(k_cache, v_cache, block_table, plan, first, start, stop, first_key, end_key,
                     head, group, soft_cap, state)  # fmt: skip
    _finish(plan, first, end, head * group, group, state, out, lse)


@njit(forceinline=True, error_model="numpy")
def _begin(
    q: Any,
    plan: AttentionPlan,
    first: int,
    end: int,
    first_head: int,
    group: int,
    scale: float,
    soft_cap: float,
    sinks: Any,
    state: RowState,
) -> None:
    """Gather the item's query rows, scaled to log2 units (or to the cap's), and reset its state."""
    factor = F32(scale * LOG2_E) if soft_cap == 0.0 else F32(scale / soft_cap)
    num_rows = (end - first) * group
    for i in range(num_rows * (len(state.o) // len(state.row_max))):
        state.o[i] = 0.0
    for i in range(num_rows * SUB):
        state.row_sum[i] = 0.0
    for i in range(num_rows):
        state.row_max[i] = F32(-np.inf)
    dim = q.shape[2]
    row = 0
    for entry in range(first, end):
        for head in range(first_head, first_head + group):
            at = (np.int64(plan.tokens[entry]) * q.strides[0] + head * q.strides[1]) // q.itemsize
            for d in range(0, dim // LANES * LANES, LANES):
                store(state.q, row * dim + d, mul(load(q, at + d), factor))
            for d in range(dim // LANES * LANES, dim):
                state.q[row * dim + d] = q[plan.tokens[entry], head, d] * factor
            if len(sinks):
                state.row_max[row] = F32(sinks[head] * LOG2_E)
                state.row_sum[row * SUB] = 1.0
            row += 1


@njit(error_model="numpy")
def _attend_keys(
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    plan: AttentionPlan,
    first_entry: int,
    start: int,
    end: int,
    first_key: int,
    end_key: int,
    head: int,
    group: int,
    soft_cap: float,
    state: RowState,
) -> None:
    """Add keys [first_key, end_key), through the table of entry `start`, to entries [start, end).

    Keys outside [full_start, full_end) are seen by some entries only: each reads its own.
    """
    num_kv_heads, key_rows, block_size = k_cache.shape[1], k_cache.shape[2], k_cache.shape[3]
    head_dim = len(state.q) // len(state.row_max)
    has_scales = k_cache.itemsize == 1
    padded_dim = v_cache.shape[3]
    slot = np.int64(plan.slots[start])
    first_row, end_row = (start - first_entry) * group, (end - first_entry) * group
    widens = k_cache.itemsize < 4 and end_row - first_row > FEW_ROWS
    first, last, full_start, full_end = _key_range(plan, start, end)
    first, last = max(first, first_key), min(last, end_key)
    for tile in range(first // TILE * TILE, last, TILE):
        sub_first, sub_end = max(tile, first // SUB * SUB), min(tile + TILE, last)
        for key in range(sub_first, sub_end, SUB):
            block = np.int64(block_table[slot, key // block_size])
            keys_at = (block * num_kv_heads + head) * key_rows * block_size
            if key + SUB < last:
                block = np.int64(block_table[slot, (key + SUB) // block_size])
                at = (block * num_kv_heads + head) * key_rows * block_size
                _prefetch(k_cache, at + (key + SUB) % block_size, head_dim, SUB, block_size)
            if widens:
                _widen(k_cache, keys_at + key % block_size, block_size, state.wide, SUB, head_dim)
                _scores(state, first_row, end_row, key - tile, state.wide, 0, SUB)
            else:
                at = keys_at + key % block_size
                _scores(state, first_row, end_row, key - tile, k_cache, at, block_size)
            if has_scales:
                at = keys_at + head_dim * block_size + 4 * (key % block_size)
                _scale(state, first_row, end_row, key - tile, k_cache, at)
        weigh_tile(
            state, first_row, end_row, tile, plan.key_start, plan.key_end, first_entry, group,
            soft_cap,
        )  # fmt: skip
        for key in range(sub_first, sub_end, SUB):
            block = np.int64(block_table[slot, key // block_size])
            v_at = ((block * num_kv_heads + head) * block_size + key % block_size) * padded_dim
            if has_scales:
                at = ((block * num_kv_heads + head) * key_rows + head_dim + 4) * block_size
                _scale(state, first_row, end_row, key - tile, k_cache, at + 4 * (key % block_size))
            if key + SUB < last:
                block = np.int64(block_table[slot, (key + SUB) // block_size])
                at = (block * num_kv_heads + head) * block_size + (key + SUB) % block_size
                _prefetch(v_cache, at * padded_dim, SUB, padded_dim, padded_dim)
            if full_start <= key and key + SUB <= full_end:
                if widens:
                    _widen(v_cache, v_at, padded_dim, state.wide, padded_dim, SUB)
                    _add_values(state, first_row, end_row, key - tile, state.wide, 0, SUB)
                else:
                    _add_values(state, first_row, end_row, key - tile, v_cache, v_at, SUB)
                continue
            for entry in range(start, end):
                seen = max(np.int64(plan.key_start[entry]), key)
                num_seen = min(np.int64(plan.key_end[entry]), key + SUB) - seen
                row, at = (entry - first_entry) * group, v_at + (seen - key) * padded_dim
                if num_seen > 0:
                    _add_values(state, row, row + group, seen - tile, v_cache, at, num_seen)


@njit(forceinline=True, error_model="numpy")
def _prefetch(cache: Any, at: int, num_rows: int, width: int, stride: int) -> None:
    """Ask for the next keys or values, which lie somewhere else: the processor cannot guess it."""
    for row in range(num_rows):
        for i in range(0, width, CACHE_LINE_BYTES // cache.itemsize):
            prefetch(cache, at + row * stride + i)


@njit(forceinline=True, error_model="numpy")
def _key_range(plan: AttentionPlan, start: int, end: int) -> tuple[Any, Any, Any, Any]:
    """Entries' keys: their union [first, last) and their intersection [full_start, full_end)."""
    first = full_start = np.int64(plan.key_start[start])
    last = full_end = np.int64(plan.key_end[start])
    for entry in range(start + 1, end):
        first = min(first, np.int64(plan.key_start[entry]))
        full_start = max(full_start, np.int64(plan.key_start[entry]))
        last = max(last, np.int64(plan.key_end[entry]))
        full_end = min(full_end, np.int64(plan.key_end[entry]))
    return first, last, full_start, full_end


@njit(error_model="numpy")
def _widen(cache: Any, at: int, stride: int, wide: Any, width: int, num_rows: int) -> None:
    """wide[:num_rows, :width] = cache[at:], whose rows are `stride` apart, in fp32."""
    for row in range(num_rows):
        for i in range(0, width, LANES):
            store(wide, row * width + i, load_wide(cache, at + row * stride + i))


@njit(error_model="numpy")
def _scores(
    state: RowState, first_row: int, end_row: int, p_at: int, keys: Any, k_at: int, stride: int
) -> None:
    """p[rows, p_at : p_at + 32] = q[rows] @ (32 keys from k_at, components `stride` apart)."""
    q, p, dim = state.q, state.p, len(state.q) // len(state.row_max)
    row = first_row
    while row < end_row:
        q_at, to = row * dim, row * TILE + p_at
        left = end_row - row
        if MANY_REGISTERS and left >= 8:
            fma_tile(8, 4, False, q, q_at, dim, keys, k_at, stride, p, to, TILE, dim)
            row += 8
        elif MANY_REGISTERS and left >= 4:
            fma_tile(4, 4, False, q, q_at, dim, keys, k_at, stride, p, to, TILE, dim)
            row += 4
        elif left == 1:
            fma_tile(1, 4, False, q, q_at, dim, keys, k_at, stride, p, to, TILE, dim)
            row += 1
        elif left == 3:
            fma_tile(3, 4, False, q, q_at, dim, keys, k_at, stride, p, to, TILE, dim)
            row += 3
        else:
            fma_tile(2, 4, False, q, q_at, dim, keys, k_at, stride, p, to, TILE, dim)
            row += 2


@njit(error_model="numpy")
def _scale(state: RowState, first_row: int, end_row: int, p_at: int, k_cache: Any, at: int) -> None:
    """p[rows, p_at : p_at + 32] *= 32 scales, which lie at the byte `at`; rounded on its own."""
    p = state.p
    for i in range(0, SUB, LANES):
        scales = load(k_cache, at + 4 * i)
        for place in range(first_row * TILE + p_at + i, end_row * TILE, TILE):
            store(p, place, mul(load(p, place), scales))


@njit(error_model="numpy")
def _add_values(
    state: RowState,
    first_row: int,
    end_row: int,
    p_at: int,
    values: Any,
    v_at: int,
    num_keys: int,
) -> None:
    """o[rows] += p[rows, p_at : p_at + num_keys] @ (values of num_keys keys from v_at)."""
    p, o, dim = state.p, state.o, len(state.o) // len(state.row_max)
    for column in range(0, dim // 32 * 32, 32):
        row = first_row
        while row < end_row:
            a, b, c = row * TILE + p_at, v_at + column, row * dim + column
            left = end_row - row
            if MANY_REGISTERS and left >= 8:
                fma_tile(8, 4, True, p, a, TILE, values, b, dim, o, c, dim, num_keys)
                row += 8
            elif MANY_REGISTERS and left >= 4:
                fma_tile(4, 4, True, p, a, TILE, values, b, dim, o, c, dim, num_keys)
                row += 4
            elif left == 1:
                fma_tile(1, 4, True, p, a, TILE, values, b, dim, o, c, dim, num_keys)
                row += 1
            elif left == 3:
                fma_tile(3, 4, True, p, a, TILE, values, b, dim, o, c, dim, num_keys)
                row += 3
            else:
                fma_tile(2, 4, True, p, a, TILE, values, b, dim, o, c, dim, num_keys)
                row += 2
    for column in range(dim // 32 * 32, dim, LANES):
        row = first_row
        while row < end_row:
            a, b, c = row * TILE + p_at, v_at + column, row * dim + column
            if end_row - row < 4:
                fma_tile(1, 1, True, p, a, TILE, values, b, dim, o, c, dim, num_keys)
                row += 1
            else:
                fma_tile(4, 1, True, p, a, TILE, values, b, dim, o, c, dim, num_keys)
                row += 4


@njit(forceinline=True, error_model="numpy")
def _finish(
    plan: AttentionPlan,
    first: int,
    end: int,
    first_head: int,
    group: int,
    state: RowState,
    out: Any,
    lse: Any,
) -> None:
    """out = o / sum of weights and lse = log(sum of exp(score)), per query row of the item."""
    dim = len(state.o) // len(state.row_max)
    row = 0
    for entry in range(first, end):
        token = np.int64(plan.tokens[entry])
        for head in range(first_head, first_head + group):
            total = horizontal_sum(load_many(state.row_sum, row * SUB))
            if total == 0.0:
                total = F32(1.0)  # no keys: o is 0 and row_max is -inf, as they should be
            at = (token * out.shape[1] + head) * out.shape[2]
            for d in range(0, out.shape[2] // LANES * LANES, LANES):
                store(out, at + d, div(load(state.o, row * dim + d), total))
            for d in range(out.shape[2] // LANES * LANES, out.shape[2]):
                out[token, head, d] = state.o[row * dim + d] / total
            lse[token, head] = state.row_max[row] * LN_2 + math.log(np.float64(total))
            row += 1
