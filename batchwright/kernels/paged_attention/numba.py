"""Paged attention on CPU: one call per layer for all rows of a step, ragged, without copies.

Exactness level *bits*: all that a query row computes is a fixed sequence of operations on its own q
and its own keys and values in order of position. Sharing an item only shares loads; masked keys
contribute nothing at all (scores are replaced, values are not read), so neighbours, chunking,
order, threads and block ids cannot change a bit. Source: FlashAttention (arXiv:2205.14135) and
PagedAttention (arXiv:2309.06180). plan.py says what an item is, item.py what is done with it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit, types

from batchwright.errors import ShapeError
from batchwright.kernels.arguments import argument_reader
from batchwright.kernels.atomics import next_task
from batchwright.kernels.paged_attention.item import attend_item
from batchwright.kernels.paged_attention.layout import KEYS_PER_VECTOR_TILE, SCALE_ROWS
from batchwright.kernels.paged_attention.online_softmax import RowState
from batchwright.kernels.paged_attention.plan import TILE, AttentionPlan
from batchwright.kernels.parallel import Task, compile_task, run_tasks, threads_for, zero_counters
from batchwright.kernels.simd import LANES

F32 = np.float32
_SMALL_WORK = 200_000
"""Products of a score, of a whole step: below (about 20 us) no second thread is woken."""
_NO_SINKS = np.empty(0, np.float32)


def paged_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    plan: AttentionPlan,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Any = None,
    out: Any,
    lse: Any,
) -> None:
    """Attention of every query token of a step over its sequence's paged keys and values.

    Args:
        q: [num_tokens, num_q_heads, head_dim] fp32 numpy array, rotated; tokens and heads may be
            strided (a view of a merged array), the last dimension is contiguous.
        k_cache, v_cache: numpy arrays as layout.py says, both fp32, both the bits of bf16 or both
            int8.
        block_table: [max_slots, max_blocks] int32; only blocks that hold needed keys are read.
        plan: of this step and this layer's KV group (same group size and number of heads).
        scale: multiplies q . k.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap); None: unchanged.
        sinks: [num_q_heads] fp32, one more logit per head that takes weight and gives no value.
        out: [num_tokens, num_q_heads, head_dim] fp32, written.
        lse: [num_tokens, num_q_heads] fp32, written: natural log of the sum of exp(score), sinks
            included. A query without keys (and sink) has lse = -inf and out = 0.
    Raises:
        ShapeError: arrays that disagree in shape.

    Exactness level *bits*, whatever the batch and the number of threads.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    _, num_kv_heads, key_rows, block_size = k_cache.shape
    if (
        key_rows != head_dim + (SCALE_ROWS if k_cache.itemsize == 1 else 0)
        or v_cache.shape[1:3] != (num_kv_heads, block_size)
        or out.shape != q.shape
        or lse.shape != (num_tokens, num_q_heads)
        or len(plan.key_end) != num_tokens
        or q.strides[2] != q.itemsize
    ):
        raise ShapeError(
            f"paged_attention: q {q.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}, "
            f"out {out.shape}, lse {lse.shape} and a plan of {len(plan.key_end)} tokens disagree, "
            f"or heads of q are not contiguous (strides {q.strides})"
        )
    group = num_q_heads // num_kv_heads
    run_tasks(
        _worker(str(k_cache.dtype)),
        threads_for(plan.num_pairs * group * head_dim, _SMALL_WORK),
        q,
        k_cache,
        v_cache,
        block_table,
        plan.items,
        plan.segments,
        plan.tokens,
        plan.slots,
        plan.key_start,
        plan.key_end,
        float(scale),
        0.0 if soft_cap is None else float(soft_cap),
        _NO_SINKS if sinks is None else sinks,
        out,
        lse,
        zero_counters(1),
    )


@functools.cache
def _worker(cache_dtype: str) -> Task:
    return compile_task(_WORK[cache_dtype])


def _reader(cache_dtype: Any) -> Any:
    """Strided q, contiguous rest."""
    f32, i32, cache = types.float32, types.int32, types.Array(cache_dtype, 4, "C")
    return argument_reader(
        types.Array(f32, 3, "A"), cache, cache, i32[:, ::1], i32[:, ::1], i32[:, ::1],
        i32[::1], i32[::1], i32[::1], i32[::1], types.float64, types.float64, f32[::1],
        f32[:, :, ::1], f32[:, ::1], types.int64[::1],
    )  # fmt: skip


_read_fp32, _read_bf16 = _reader(types.float32), _reader(types.uint16)
_read_int8 = _reader(types.int8)

# One function for each type: compiled code is found again by its function's name.


def _work_fp32(i: int, n: int, at: int) -> None:
    _attend(*_read_fp32(at))


def _work_bf16(i: int, n: int, at: int) -> None:
    _attend(*_read_bf16(at))


def _work_int8(i: int, n: int, at: int) -> None:
    _attend(*_read_int8(at))


_WORK = {"float32": _work_fp32, "uint16": _work_bf16, "int8": _work_int8}


@njit(error_model="numpy")
def _attend(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    items: Any,
    segments: Any,
    tokens: Any,
    slots: Any,
    key_start: Any,
    key_end: Any,
    scale: float,
    soft_cap: float,
    sinks: Any,
    out: Any,
    lse: Any,
    counter: Any,
) -> None:
    """Take the next dearest item until there are none left: no static split fits a ragged step."""
    max_tokens = 1
    for i in range(len(items)):
        max_tokens = max(max_tokens, items[i, 2] - items[i, 1])
    max_rows = -(-max_tokens * (q.shape[1] // k_cache.shape[1]) // LANES) * LANES
    state = RowState(
        _aligned(max_rows * q.shape[2]),
        _aligned(max_rows * TILE),
        _aligned(max_rows * v_cache.shape[3]),
        _aligned(max_rows),
        _aligned(max_rows * KEYS_PER_VECTOR_TILE),
        _aligned(max_rows),
        _aligned(KEYS_PER_VECTOR_TILE * v_cache.shape[3]),
    )
    plan = AttentionPlan(items, segments, tokens, slots, key_start, key_end, 0)
    i = next_task(counter)
    while i < len(items) and items[i, 1] < items[i, 2]:
        attend_item(
            q, k_cache, v_cache, block_table, plan, i, scale, soft_cap, sinks, out, lse, state
        )
        i = next_task(counter)


@njit(error_model="numpy")
def _aligned(size: int) -> Any:
    """[size] fp32, beginning on a cache line: a vector of 16 lanes then lies in one line."""
    memory = np.empty(size + 16, F32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + size]
