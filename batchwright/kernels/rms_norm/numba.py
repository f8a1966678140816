"""Row-wise RMS norm on CPU, with the residual sum that precedes it (arXiv:1910.07467).

Exactness level *bits*: a row's sum of squares is taken in 32 fixed partial sums by column, whatever
the number of rows and threads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit, types

from batchwright.errors import ShapeError
from batchwright.kernels.arguments import argument_reader
from batchwright.kernels.parallel import Task, compile_task, run_tasks, threads_for
from batchwright.kernels.simd import (
    LANES,
    add,
    constant,
    fma,
    horizontal_sum,
    load,
    load_first,
    mul,
    splat,
    store,
    store_first,
)

F32 = np.float32
_ELEMENTS_PER_THREAD = 65536
"""About 20 us of work, what it takes to wake a sleeping thread."""


def rms_norm(
    x: Any,
    weight: Any,
    eps: float,
    out: Any,
    *,
    residual: Any = None,
    unit_offset: bool = False,
) -> None:
    """out = norm(x) * weight, or with residual: residual += x; out = norm(residual) * weight.

    Args:
        x: [num_tokens, hidden_size] or [num_tokens, num_heads, head_dim] fp32 numpy array; the last
            dimension is contiguous and normalised, the others may be strided.
        weight: [hidden_size] fp32.
        out: like x, written; it may be x itself.
        residual: like x; updated in place to the sum that is normalised.
        unit_offset: multiply by (1 + weight), as Gemma does.
    Raises:
        ShapeError: shapes disagree or the last dimension is not contiguous.

    norm(x) = x * (1 / sqrt(mean(x^2) + eps)) in fp32, as transformers computes it. Level *bits*.
    """
    if x.ndim == 2:
        x, out = x[:, None], out[:, None]
        residual = residual if residual is None else residual[:, None]
    total = x if residual is None else residual
    if not x.shape == out.shape == total.shape or weight.shape != x.shape[2:]:
        raise ShapeError(
            f"rms_norm: x {x.shape}, out {out.shape}, residual {total.shape} and "
            f"weight {weight.shape} disagree"
        )
    if not x.strides[2] == out.strides[2] == total.strides[2] == x.itemsize:
        raise ShapeError("rms_norm: the last dimension must be contiguous; call .contiguous()")
    run_tasks(
        _worker(),
        threads_for(x.size, _ELEMENTS_PER_THREAD),
        x,
        total,
        residual is not None,
        weight,
        eps,
        unit_offset,
        out,
    )


_read = argument_reader(
    types.Array(types.float32, 3, "A"),
    types.Array(types.float32, 3, "A"),
    types.boolean,
    types.float32[::1],
    types.float64,
    types.boolean,
    types.Array(types.float32, 3, "A"),
)


def _norm(i: int, n: int, at: int) -> None:
    _part(i, n, *_read(at))


@functools.cache
def _worker() -> Task:
    return compile_task(_norm)


@njit(error_model="numpy")
def _part(
    i: int,
    n: int,
    x: Any,
    total: Any,
    add_x: bool,
    weight: Any,
    eps: float,
    unit_offset: bool,
    out: Any,
) -> None:
    start, end = i * len(x) // n, (i + 1) * len(x) // n
    _rows(x, total, add_x, weight, eps, unit_offset, out, start, end)


@njit(error_model="numpy")
def _rows(
    x: Any,
    total: Any,
    add_x: bool,
    weight: Any,
    eps: float,
    unit_offset: bool,
    out: Any,
    start: int,
    end: int,
) -> None:
    size = x.itemsize
    for token in range(start, end):
        for head in range(x.shape[1]):
            x_at = (token * x.strides[0] + head * x.strides[1]) // size
            total_at = (token * total.strides[0] + head * total.strides[1]) // size
            out_at = (token * out.strides[0] + head * out.strides[1]) // size
            if add_x:
                _add_row(x, x_at, total, total_at, x.shape[2])
            squares = _sum_of_squares(total, total_at, x.shape[2])
            mean = F32(squares / F32(x.shape[2]))
            scale = F32(F32(1.0) / np.sqrt(F32(mean + F32(eps))))
            _scale_row(total, total_at, scale, weight, unit_offset, out, out_at)


@njit(forceinline=True, error_model="numpy")
def _add_row(x: Any, x_at: int, total: Any, total_at: int, length: int) -> None:
    """total += x, one row."""
    whole = length // LANES * LANES
    for i in range(0, whole, LANES):
        store(total, total_at + i, add(load(x, x_at + i), load(total, total_at + i)))
    if whole < length:
        rest, x_at, total_at = length - whole, x_at + whole, total_at + whole
        both = add(load_first(x, x_at, rest), load_first(total, total_at, rest))
        store_first(total, total_at, rest, both)


@njit(forceinline=True, error_model="numpy")
def _sum_of_squares(x: Any, at: int, length: int) -> Any:
    """Sum of a row's squares, in 32 partial sums (four vectors keep the pipeline full)."""
    s0 = constant(0.0)
    s1, s2, s3 = s0, s0, s0
    groups = length // (4 * LANES) * (4 * LANES)
    for i in range(at, at + groups, 4 * LANES):
        v0, v1 = load(x, i), load(x, i + LANES)
        v2, v3 = load(x, i + 2 * LANES), load(x, i + 3 * LANES)
        s0, s1 = fma(v0, v0, s0), fma(v1, v1, s1)
        s2, s3 = fma(v2, v2, s2), fma(v3, v3, s3)
    for i in range(groups, length, LANES):
        v0 = load_first(x, at + i, length - i)
        s0 = fma(v0, v0, s0)
    return horizontal_sum(add(add(s0, s1), add(s2, s3)))


@njit(forceinline=True, error_model="numpy")
def _scale_row(
    total: Any, total_at: int, scale: Any, weight: Any, unit_offset: bool, out: Any, out_at: int
) -> None:
    factor, offset = splat(scale), constant(1.0)
    length = len(weight)
    whole = length // LANES * LANES
    for i in range(0, whole, LANES):
        w = load(weight, i)
        if unit_offset:
            w = add(offset, w)
        store(out, out_at + i, mul(mul(load(total, total_at + i), factor), w))
    if whole < length:
        rest = length - whole
        w = load_first(weight, whole, rest)
        if unit_offset:
            w = add(offset, w)
        value = mul(mul(load_first(total, total_at + whole, rest), factor), w)
        store_first(out, out_at + whole, rest, value)
