"""Rotary embedding of queries and keys, and the write of keys and values into blocks, on CPU.

Exactness level *bits*: x * cos + rotate_half(x) * sin with every product and sum rounded on its
own, as transformers computes it on tensors.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit, types

from batchwright.errors import ShapeError
from batchwright.kernels.arguments import argument_reader
from batchwright.kernels.paged_attention.layout import SCALE_ROWS
from batchwright.kernels.parallel import Task, compile_task, run_tasks, threads_for
from batchwright.kernels.simd import (
    LANES,
    add,
    load,
    load_first,
    mul,
    splat,
    store,
    store_first,
    stored,
    sub,
)

_ELEMENTS_PER_THREAD = 2048
"""Of queries; 10 us of work and more: each component of a key is written to a line of memory of its
own, that seldom is in a cache."""
_NO_TABLE = np.empty((0, 0), np.float32)


def rotary_kv_write(
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    positions: Any,
    slot_mapping: Any,
    cos: Any = None,
    sin: Any = None,
    *,
    interleaved: bool = False,
) -> None:
    """Rotate q in place; write rotated k, and v, into the caches. k and v are left as they are.

    Args:
        q: [num_tokens, num_q_heads, head_dim] fp32 numpy array, changed in place.
        k, v: [num_tokens, num_kv_heads, head_dim] fp32. q, k and v may be views of one merged
            array: heads may be strided, the last dimension is contiguous.
        k_cache, v_cache: as paged_attention/layout.py says. Where these are bf16 numbers are
            rounded to the nearest; where they are int8 a key or value of one head becomes the
            nearest multiples of its largest absolute component / 127, ties to even.
        positions: [num_tokens] int32, lines of the tables.
        slot_mapping: [num_tokens] int32: block_id * block_size + offset, or -1: do not write.
        cos, sin: [max_positions, rotary_dim / 2] fp32, rotary_dim <= head_dim; None: no rotation.
        interleaved: pairs are components (2i, 2i + 1) (GPT-J); else (i, i + rotary_dim / 2).
    Raises:
        ShapeError: shapes disagree, or the last dimension is not contiguous.

    Level *bits*.
    """
    cos = _NO_TABLE if cos is None else cos
    sin = _NO_TABLE if sin is None else sin
    num_tokens, num_kv_heads, head_dim = k.shape
    if (
        v.shape != k.shape
        or q.shape[::2] != k.shape[::2]
        or k_cache.shape[1] != num_kv_heads
        or k_cache.shape[2] != head_dim + (SCALE_ROWS if k_cache.itemsize == 1 else 0)
        or v_cache.shape[1] != num_kv_heads
        or v_cache.shape[2] != k_cache.shape[3]
        or cos.shape != sin.shape
        or 2 * cos.shape[1] > head_dim
        or not num_tokens == len(positions) == len(slot_mapping)
    ):
        raise ShapeError(
            f"rotary_kv_write: q {q.shape}, k {k.shape}, v {v.shape}, k_cache {k_cache.shape}, "
            f"v_cache {v_cache.shape}, tables {cos.shape} and {sin.shape}, {len(positions)} "
            f"positions and {len(slot_mapping)} slots disagree"
        )
    if not q.strides[2] == k.strides[2] == v.strides[2] == q.itemsize:
        raise ShapeError("rotary_kv_write: heads must be contiguous; call .contiguous()")
    run_tasks(
        _worker(str(k_cache.dtype)),
        threads_for(q.size, _ELEMENTS_PER_THREAD),
        q,
        k,
        v,
        k_cache,
        v_cache,
        positions,
        slot_mapping,
        cos,
        sin,
        interleaved,
    )


@functools.cache
def _worker(cache_dtype: str) -> Task:
    return compile_task(_WORK[cache_dtype])


def _reader(cache_dtype: Any) -> Any:
    heads, cache = types.Array(types.float32, 3, "A"), types.Array(cache_dtype, 4, "C")
    tokens, table = types.int32[::1], types.float32[:, ::1]
    return argument_reader(
        heads, heads, heads, cache, cache, tokens, tokens, table, table, types.boolean
    )


_read_fp32, _read_bf16 = _reader(types.float32), _reader(types.uint16)
_read_int8 = _reader(types.int8)

# One function for each type: compiled code is found again by its function's name.


def _write_fp32(i: int, n: int, at: int) -> None:
    _part(i, n, *_read_fp32(at))


def _write_bf16(i: int, n: int, at: int) -> None:
    _part(i, n, *_read_bf16(at))


def _write_int8(i: int, n: int, at: int) -> None:
    _part(i, n, *_read_int8(at))


_WORK = {"float32": _write_fp32, "uint16": _write_bf16, "int8": _write_int8}


@njit
def _part(
    i: int,
    n: int,
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    positions: Any,
    slot_mapping: Any,
    cos: Any,
    sin: Any,
    interleaved: bool,
) -> None:
    start, end = i * len(q) // n, (i + 1) * len(q) // n
    _rows(q, k, v, k_cache, v_cache, positions, slot_mapping, cos, sin, interleaved, start, end)


@njit
def _rows(
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    positions: Any,
    slot_mapping: Any,
    cos: Any,
    sin: Any,
    interleaved: bool,
    start: int,
    end: int,
) -> None:
    """Tokens [start, end)."""
    _rotate_queries(q, positions, cos, sin, interleaved, start, end)
    _write_keys(k, k_cache, positions, slot_mapping, cos, sin, interleaved, start, end)
    _write_values(v, k_cache, v_cache, slot_mapping, start, end)


@njit
def _rotate_queries(
    q: Any, positions: Any, cos: Any, sin: Any, interleaved: bool, start: int, end: int
) -> None:
    if cos.shape[1] == 0:
        return
    for token in range(start, end):
        for head in range(q.shape[1]):
            at = (token * q.strides[0] + head * q.strides[1]) // q.itemsize
            _rotate(q, at, q, at, cos, sin, positions[token] * cos.shape[1], interleaved)


@njit
def _write_keys(
    k: Any,
    k_cache: Any,
    positions: Any,
    slot_mapping: Any,
    cos: Any,
    sin: Any,
    interleaved: bool,
    start: int,
    end: int,
) -> None:
    block_size = k_cache.shape[3]
    head_dim = k.shape[2]
    rotated = np.empty(head_dim, np.float32)
    for head in range(k.shape[1]):
        for token in range(start, end):
            slot = slot_mapping[token]
            if slot < 0:
                continue
            for d in range(head_dim):
                rotated[d] = k[token, head, d]
            if cos.shape[1]:
                at = positions[token] * cos.shape[1]
                _rotate(rotated, 0, rotated, 0, cos, sin, at, interleaved)
            block, offset = slot // block_size, slot % block_size
            if k_cache.itemsize == 1:
                _quantise(rotated, k_cache, block, head, head_dim, offset)
            for d in range(head_dim):
                k_cache[block, head, d, offset] = stored(k_cache, rotated[d])


@njit
def _write_values(
    v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, start: int, end: int
) -> None:
    block_size, head_dim = v_cache.shape[2], v.shape[2]
    numbers = np.empty(head_dim, np.float32)
    for token in range(start, end):
        slot = slot_mapping[token]
        if slot >= 0:
            block, offset = slot // block_size, slot % block_size
            for head in range(v.shape[1]):
                for d in range(head_dim):
                    numbers[d] = v[token, head, d]
                if v_cache.itemsize == 1:
                    _quantise(numbers, k_cache, block, head, head_dim + 4, offset)
                for d in range(head_dim):
                    v_cache[block, head, offset, d] = stored(v_cache, numbers[d])


@njit
def _quantise(x: Any, k_cache: Any, block: int, head: int, row: int, offset: int) -> None:
    """Make x whole numbers from -127 to 127, and write what one of them stands for.

    Where a component is not finite that is not either, so that whoever reads it finds out.

    Args:
        row: of k_cache, at which scales begin.
    """
    largest = np.float32(0.0)
    for d in range(len(x)):
        size = abs(x[d])
        if size > largest or size != size:  # NaN stays
            largest = size
    inverse = np.float32(127.0) / largest if 0 < largest < np.inf else np.float32(0.0)
    for d in range(len(x)):
        x[d] = np.rint(x[d] * inverse) if inverse else np.float32(0.0)
    at = ((block * k_cache.shape[1] + head) * k_cache.shape[2] + row) * k_cache.shape[3]
    store_first(k_cache, at + 4 * offset, 1, splat(largest / np.float32(127.0)))


@njit(forceinline=True)
def _rotate(
    x: Any, x_at: int, out: Any, out_at: int, cos: Any, sin: Any, angle_at: int, interleaved: bool
) -> None:
    """Rotate one head in place or into `out`; angle_at is the element of the tables to start at."""
    half = cos.shape[1]
    if interleaved:
        for i in range(half):
            _rotate_pair(x, x_at, out, out_at, cos, sin, angle_at, i)
        return
    whole = half // LANES * LANES
    for i in range(0, whole, LANES):
        a, b = load(x, x_at + i), load(x, x_at + half + i)
        c, s = load(cos, angle_at + i), load(sin, angle_at + i)
        store(out, out_at + i, sub(mul(a, c), mul(b, s)))
        store(out, out_at + half + i, add(mul(b, c), mul(a, s)))
    if whole < half:
        rest, i = half - whole, whole
        a, b = load_first(x, x_at + i, rest), load_first(x, x_at + half + i, rest)
        c, s = load_first(cos, angle_at + i, rest), load_first(sin, angle_at + i, rest)
        store_first(out, out_at + i, rest, sub(mul(a, c), mul(b, s)))
        store_first(out, out_at + half + i, rest, add(mul(b, c), mul(a, s)))


@njit(forceinline=True)
def _rotate_pair(
    x: Any, x_at: int, out: Any, out_at: int, cos: Any, sin: Any, angle_at: int, i: int
) -> None:
    a, b = load_first(x, x_at + 2 * i, 1), load_first(x, x_at + 2 * i + 1, 1)
    c, s = load_first(cos, angle_at + i, 1), load_first(sin, angle_at + i, 1)
    store_first(out, out_at + 2 * i, 1, sub(mul(a, c), mul(b, s)))
    store_first(out, out_at + 2 * i + 1, 1, add(mul(b, c), mul(a, s)))
