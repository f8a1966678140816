"""Activations of feed-forward layers on CPU: act(gate) * up on merged rows, or act(x).

Exactness level *bits*: every element goes through the same vector operations, wherever it stands.
torch's own elementwise operations use other code for a vector body than for a tail, which batch
size and threads move.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import njit, types

from batchwright.errors import ConfigError, ShapeError
from batchwright.kernels.arguments import argument_reader
from batchwright.kernels.parallel import Task, compile_task, run_tasks, threads_for
from batchwright.kernels.simd import (
    LANES,
    MANY_LANES,
    add,
    div,
    fma,
    load,
    load_first,
    load_many,
    maximum,
    mul,
    store,
    store_first,
    sub,
)
from batchwright.kernels.simd_math import erf, exp, tanh

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_ELEMENTS_PER_THREAD = 32768
"""About 20 us of work, what it takes to wake a sleeping thread."""


def gated_activation(x: Any, kind: str, out: Any) -> None:
    """out = activation(gate) * up.

    Args:
        x: [num_tokens, 2 * size] fp32 numpy array, gate then up; rows contiguous in themselves.
        kind: silu, gelu, gelu_tanh or relu.
        out: [num_tokens, size] fp32, written.
    Raises:
        ConfigError: unknown kind.
        ShapeError: shapes disagree or rows are not contiguous.

    Within a few ulp of torch in fp32 (the naive twin in fp64). Level *bits*.
    """
    if x.shape != (len(out), 2 * out.shape[1]):
        raise ShapeError(f"gated_activation: x {x.shape} is not twice as wide as out {out.shape}")
    _run(x, kind, True, out)


def activation(x: Any, kind: str, out: Any) -> None:
    """out = activation(x), both [num_tokens, size]; out may be x. As gated_activation otherwise."""
    if x.shape != out.shape:
        raise ShapeError(f"activation: x {x.shape} and out {out.shape} disagree")
    _run(x, kind, False, out)


def _run(x: Any, kind: str, gated: bool, out: Any) -> None:
    if kind not in KINDS:
        raise ConfigError(f"activation is {kind!r}; supported: {', '.join(KINDS)}")
    if not x.strides[1] == out.strides[1] == x.itemsize:
        raise ShapeError("activation: rows must be contiguous; call .contiguous()")
    threads = threads_for(out.size, _ELEMENTS_PER_THREAD)
    run_tasks(_worker(), threads, x, KINDS[kind], gated, out)


_read = argument_reader(
    types.Array(types.float32, 2, "A"),
    types.int64,
    types.boolean,
    types.Array(types.float32, 2, "A"),
)


def _activate(i: int, n: int, at: int) -> None:
    _part(i, n, *_read(at))


@functools.cache
def _worker() -> Task:
    return compile_task(_activate)


@njit(error_model="numpy")
def _part(i: int, n: int, x: Any, kind: int, gated: bool, out: Any) -> None:
    _rows(x, kind, gated, out, i * len(x) // n, (i + 1) * len(x) // n)


@njit(error_model="numpy")
def _rows(x: Any, kind: int, gated: bool, out: Any, start: int, end: int) -> None:
    size = out.shape[1]
    many, whole = size // MANY_LANES * MANY_LANES, size // LANES * LANES
    for token in range(start, end):
        x_at = token * x.strides[0] // x.itemsize
        out_at = token * out.strides[0] // out.itemsize
        for i in range(0, many, MANY_LANES):
            values = _act(load_many(x, x_at + i), kind)
            if gated:
                values = mul(values, load_many(x, x_at + size + i))
            store(out, out_at + i, values)
        for i in range(many, whole, LANES):
            value = _act(load(x, x_at + i), kind)
            if gated:
                value = mul(value, load(x, x_at + size + i))
            store(out, out_at + i, value)
        if whole < size:
            rest = size - whole
            value = _act(load_first(x, x_at + whole, rest), kind)
            if gated:
                value = mul(value, load_first(x, x_at + size + whole, rest))
            store_first(out, out_at + whole, rest, value)


@njit(forceinline=True, error_model="numpy")
def _act(x: Any, kind: int) -> Any:
    if kind == 0:
        return _silu(x)
    if kind == 1:
        return _gelu(x)
    if kind == 2:
        return _gelu_tanh(x)
    return maximum(0.0, x)


@njit(forceinline=True, error_model="numpy")
def _silu(x: Any) -> Any:
    """x / (1 + exp(-x))."""
    return div(x, add(exp(sub(0.0, x)), 1.0))


@njit(forceinline=True, error_model="numpy")
def _gelu(x: Any) -> Any:
    """x / 2 * (1 + erf(x / sqrt 2))."""
    half = mul(x, 0.5)
    return fma(half, erf(mul(x, 0.7071067811865476)), half)


@njit(forceinline=True, error_model="numpy")
def _gelu_tanh(x: Any) -> Any:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    cube = mul(mul(x, x), x)
    inner = mul(fma(cube, 0.044715, x), 0.7978845608028654)
    half = mul(x, 0.5)
    return fma(half, tanh(inner), half)
