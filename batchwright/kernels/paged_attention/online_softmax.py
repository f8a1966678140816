"""The softmax step of one tile of keys: scores become weights, and each row's state follows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from batchwright.kernels.paged_attention.layout import KEYS_PER_VECTOR_TILE as SUB
from batchwright.kernels.paged_attention.plan import TILE
from batchwright.kernels.simd import (
    LANES,
    add,
    horizontal_max,
    load,
    load_many,
    maximum,
    mul,
    store,
    sub,
    where_in_range,
    where_less,
)
from batchwright.kernels.simd_math import exp2, tanh

LOG2_E = math.log2(math.e)
F32 = np.float32


class RowState(NamedTuple):
    """Scratch of one thread, flat fp32 arrays, with room for all rows of an item."""

    q: Any  # [rows, head_dim] queries, scaled
    p: Any  # [rows, TILE] scores of a tile, then weights
    o: Any  # [rows, padded head_dim] sum of weighted values
    row_max: Any  # [rows] largest score so far, log2 units
    row_sum: Any  # [rows, SUB] partial sums of weights 2**(score - row_max)
    shrink: Any  # [rows] what a larger maximum leaves of o and row_sum
    wide: Any  # [SUB * padded head_dim] keys or values, made fp32 once for many rows


@njit(error_model="numpy")
def weigh_tile(
    state: RowState,
    first_row: int,
    end_row: int,
    tile: int,
    key_start: Any,
    key_end: Any,
    first_entry: int,
    group: int,
    soft_cap: float,
) -> None:
    """Turn scores of keys [tile, tile + 128) into weights and bring the rows' state up to date.

    A row belongs to entry first_entry + row // group, which sees keys [key_start, key_end).

    In passes over the rows: a row's maximum and its exponentials are long chains of dependent
    operations, and a processor overlaps those of neighbouring rows if nothing lies between them.
    """
    p, o, row_max, row_sum, shrink = state.p, state.o, state.row_max, state.row_sum, state.shrink
    for row in range(first_row, end_row):
        entry = first_entry + row // group
        begin, end = max(key_start[entry] - tile, 0), min(key_end[entry] - tile, TILE)
        if begin == 0 and end == TILE and soft_cap == 0.0:
            largest = _tile_max(p, row * TILE)
        else:
            largest = _masked_max(p, row * TILE, begin, end, soft_cap)
        shrink[row] = row_max[row]
        row_max[row] = max(row_max[row], horizontal_max(largest))
    # Eight rows at a time; neighbours' entries of shrink may be overwritten, they are not in use.
    for i in range(first_row // LANES * LANES, end_row, LANES):
        old, new = load(shrink, i), load(row_max, i)
        # A row that has seen no key keeps its empty state: -inf minus -inf would be NaN.
        factor = where_less(-np.inf, new, exp2(sub(old, new)), 1.0)
        store(shrink, i, factor)
    dim = len(o) // len(row_max)
    for row in range(first_row, end_row):
        if shrink[row] != 1.0:
            factor = shrink[row]
            for column in range(row * dim, (row + 1) * dim, LANES):
                store(o, column, mul(load(o, column), factor))
            store(row_sum, row * SUB, mul(load_many(row_sum, row * SUB), factor))
    for row in range(first_row, end_row):
        entry = first_entry + row // group
        begin, end = max(key_start[entry] - tile, 0), min(key_end[entry] - tile, TILE)
        if begin < end:
            top, total = row_max[row], load_many(row_sum, row * SUB)
            for at in range(row * TILE + begin // SUB * SUB, row * TILE + end, SUB):
                weight = exp2(sub(load_many(p, at), top))
                store(p, at, weight)
                total = add(total, weight)
            store(row_sum, row * SUB, total)


@njit(forceinline=True, error_model="numpy")
def _tile_max(p: Any, at: int) -> Any:
    """Lane-wise maximum of 128 scores."""
    largest = load_many(p, at)
    for i in range(at + SUB, at + TILE, SUB):
        largest = maximum(load_many(p, i), largest)
    return largest


@njit(forceinline=True, error_model="numpy")
def _masked_max(p: Any, at: int, begin: int, end: int, soft_cap: float) -> Any:
    """Lane-wise maximum of scores [begin, end), capped; scores beside them become -inf."""
    largest = where_in_range(0, 0, load_many(p, at), -np.inf)
    for i in range(begin // SUB * SUB, end, SUB):
        score = load_many(p, at + i)
        if soft_cap != 0.0:
            score = mul(tanh(score), soft_cap * LOG2_E)
        score = where_in_range(begin - i, end - i, score, -np.inf)
        store(p, at + i, score)
        largest = maximum(score, largest)
    return largest
