"""Rotary embedding of queries and keys, and the write of keys and values into blocks, on a GPU.

One program a token: all its loads are independent of each other, and a step of one token per row
starts no more programs than it has rows. Bound by bandwidth for many tokens, by latency for few.
Angles, products and sums are fp32 for every dtype. Exactness level *bits*: elementwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batchwright.errors import ShapeError


def rotary_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Rotate q in place; write rotated k, and v, into the caches. k and v are left as they are.

    Args:
        q: [num_tokens, num_q_heads, head_dim] fp32, fp16 or bf16, changed in place.
        k, v: [num_tokens, num_kv_heads, head_dim], q's dtype. q, k and v may be views of one merged
            tensor: tokens and heads may be strided, the last dimension is contiguous.
        k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], contiguous: any float
            dtype, float8_e4m3fn (compute capability 8.9 or more) or int8. Values are converted
            from fp32, once; see below.
        positions: [num_tokens] int32, lines of the tables.
        slot_mapping: [num_tokens] int32: block_id * block_size + offset, or -1: do not write.
        cos, sin: [max_positions, rotary_dim / 2] fp32, rotary_dim <= head_dim; None: no rotation.
        interleaved: pairs are components (2i, 2i + 1) (GPT-J); else (i, i + rotary_dim / 2).
        scales: with int8 caches, and only then: fp32, [num_blocks, num_kv_heads, block_size] each,
            contiguous, written.
    Raises:
        ShapeError: shapes disagree, or the last dimension is not contiguous.

    8-bit caches are lossy. float8_e4m3fn has no scale: 4 significant bits from 2^-6 on, fewer
    below, and what is beyond 448 becomes 448. int8 has a scale for every token and head, its
    largest absolute component / 127; so no statistic is taken over rows of different owners.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    half = 0 if cos is None else cos.shape[1]
    if (
        v.shape != k.shape
        or q.shape[::2] != k.shape[::2]
        or k_cache.shape != v_cache.shape
        or k_cache.shape[1] != num_kv_heads
        or k_cache.shape[3] != head_dim
        or (cos is None) != (sin is None)
        or (cos is not None and sin is not None and cos.shape != sin.shape)
        or 2 * half > head_dim
        or (scales is not None) != (k_cache.dtype == torch.int8)
        or (scales is not None and not scales[0].shape == scales[1].shape == k_cache.shape[:3])
        or not num_tokens == len(positions) == len(slot_mapping)
    ):
        tables = [None if table is None else tuple(table.shape) for table in (cos, sin)]
        raise ShapeError(
            f"rotary_kv_write: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, k_cache "
            f"{tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}, tables {tables[0]} and "
            f"{tables[1]}, {len(positions)} positions, {len(slot_mapping)} slots and scales "
            f"{None if scales is None else [tuple(x.shape) for x in scales]} disagree"
        )
    tables_contiguous = all(table is None or table.is_contiguous() for table in (cos, sin))
    if (
        not q.stride(2) == k.stride(2) == v.stride(2) == 1
        or not k_cache.is_contiguous()
        or not v_cache.is_contiguous()
        or not tables_contiguous
    ):
        raise ShapeError("rotary_kv_write: heads, caches and tables must be contiguous")
    if num_tokens == 0:
        return
    block_q, block_kv = triton.next_power_of_2(q.shape[1]), triton.next_power_of_2(num_kv_heads)
    block_d = triton.next_power_of_2(head_dim)
    _rotary_kv_write[(num_tokens,)](
        q, k, v, k_cache, v_cache, positions, slot_mapping, cos, sin,
        *(scales or (None, None)), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        Q_HEADS=q.shape[1], KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HALF=half,
        BLOCK_SIZE=k_cache.shape[2], BLOCK_Q=block_q, BLOCK_KV=block_kv, BLOCK_D=block_d,
        BLOCK_HALF=triton.next_power_of_2(max(half, 1)), INTERLEAVED=interleaved,
        SCALED=scales is not None,
        num_warps=8 if block_q * block_d > 4096 else 4,
    )  # fmt: skip


@triton.jit
def _stored(x: tl.tensor, inverse: tl.tensor, cache: tl.tensor, SCALED: tl.constexpr) -> tl.tensor:
    """fp32 numbers [heads, any] as the cache keeps them; inverse [heads]: 1 / scale."""
    if SCALED:
        # adding and subtracting 1.5 * 2^23 rounds to an integer, halves to even
        return ((x * inverse[:, None] + 12582912.0) - 12582912.0).to(tl.int8)
    elif cache.dtype.element_ty.is_fp8():
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        return x.to(cache.dtype.element_ty)
    else:
        return x.to(cache.dtype.element_ty)


@triton.jit
def _largest(x: tl.tensor) -> tl.tensor:
    """Largest absolute number of each row, [rows, any] -> [rows]; NaN if one is NaN or infinite."""
    return tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)


@triton.jit
def _inverse(largest: tl.tensor) -> tl.tensor:
    """127 / largest; 0 where all is 0."""
    return tl.where(largest > 0.0, 127.0 / tl.where(largest > 0.0, largest, 1.0), 0.0)


@triton.jit
def _rotary_kv_write(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    positions: tl.tensor,
    slot_mapping: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    q_head, kv_head, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV), tl.arange(0, BLOCK_D)
    # where the heads of this token go: [BLOCK_KV]
    block = (slot // BLOCK_SIZE).to(tl.int64)
    place = (block * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    to = place * HEAD_DIM
    written = (kv_head < KV_HEADS) & (slot >= 0)
    k_from = token * k_token_stride + kv_head * k_head_stride
    v_from = token * v_token_stride + kv_head * v_head_stride
    held = written[:, None] & (d < HEAD_DIM)[None, :]
    values = tl.load(v + v_from[:, None] + d[None, :], mask=held, other=0.0).to(tl.float32)
    inverse = tl.zeros([BLOCK_KV], tl.float32)
    if SCALED:
        largest = _largest(values)
        inverse = _inverse(largest)
        tl.store(v_scales + place, largest * (1.0 / 127.0), mask=written)
    kept = _stored(values, inverse, v_cache, SCALED)
    tl.store(v_cache + to[:, None] + d[None, :], kept, mask=held)

    # keys that are not rotated are kept as they are
    rest_held = written[:, None] & ((d >= 2 * HALF) & (d < HEAD_DIM))[None, :]
    largest = tl.zeros([BLOCK_KV], tl.float32)
    if 2 * HALF < HEAD_DIM:
        rest = tl.load(k + k_from[:, None] + d[None, :], mask=rest_held, other=0.0).to(tl.float32)
        largest = _largest(rest)
    if HALF:
        pair = tl.arange(0, BLOCK_HALF)
        position = tl.load(positions + token).to(tl.int64)
        c = tl.load(cos + position * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
        s = tl.load(sin + position * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
        if INTERLEAVED:
            one, two = 2 * pair, 2 * pair + 1
        else:
            one, two = pair, pair + HALF
        held = written[:, None] & (pair < HALF)[None, :]
        a = tl.load(k + k_from[:, None] + one[None, :], mask=held, other=0.0).to(tl.float32)
        b = tl.load(k + k_from[:, None] + two[None, :], mask=held, other=0.0).to(tl.float32)
        first, second = (a * c - b * s), (b * c + a * s)
        if SCALED:
            for_first, for_second = _largest(first), _largest(second)
            largest = tl.maximum(largest, for_first, propagate_nan=tl.PropagateNan.ALL)
            largest = tl.maximum(largest, for_second, propagate_nan=tl.PropagateNan.ALL)
            inverse = _inverse(largest)
        kept = _stored(first, inverse, k_cache, SCALED)
        tl.store(k_cache + to[:, None] + one[None, :], kept, mask=held)
        kept = _stored(second, inverse, k_cache, SCALED)
        tl.store(k_cache + to[:, None] + two[None, :], kept, mask=held)

        q_from = token * q_token_stride + q_head * q_head_stride
        held = (q_head < Q_HEADS)[:, None] & (pair < HALF)[None, :]
        place_one, place_two = (
            q + q_from[:, None] + one[None, :],
            q + q_from[:, None] + two[None, :],
        )
        a = tl.load(place_one, mask=held, other=0.0).to(tl.float32)
        b = tl.load(place_two, mask=held, other=0.0).to(tl.float32)
        first, second = (a * c - b * s), (b * c + a * s)
        tl.store(place_one, first.to(q.dtype.element_ty), mask=held)
        tl.store(place_two, second.to(q.dtype.element_ty), mask=held)
    if SCALED:
        inverse = _inverse(largest)
        tl.store(k_scales + place, largest * (1.0 / 127.0), mask=written)
    if 2 * HALF < HEAD_DIM:
        kept = _stored(rest, inverse, k_cache, SCALED)
        tl.store(k_cache + to[:, None] + d[None, :], kept, mask=rest_held)
