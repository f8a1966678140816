"""Paged attention on a GPU: decoding, chunked prefill and shared prefixes by one Triton kernel.

k_cache and v_cache are [num_blocks, num_kv_heads, block_size, head_dim] each: one head of a block
is one contiguous piece. A program takes one item of work_list.py and one kv head: its query rows
are tokens x heads of the group, so that a key is loaded once for all of them, and keys pass by in
tiles with a running softmax in fp32 (FlashAttention-2, arXiv:2307.08691; pieces of long contexts as
in Flash-Decoding; shared prefixes as in Hydragen, arXiv:2402.05099). Scores are in units of log2.

Exactness level *rounding*: the pieces that a row's keys are cut into, and so the order of sums,
depend on the step. Keys that a row does not see have weight 0; those beyond every row of an item,
and slots that hold no key, are not read at all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from batchwright.errors import ShapeError
from batchwright.kernels.paged_attention.device_work import DeviceWork
from batchwright.kernels.paged_attention.tiling import TileShape, Tiling
from batchwright.kernels.paged_attention.work_list import WorkList

LOG2_E = math.log2(math.e)
MAX_MERGED_AT_ONCE = 64
"""Partial results of a token and head that the merging kernel has in registers."""


def to_device(work: WorkList, device: torch.device | str) -> DeviceWork:
    """Copy a work list in one transfer, from pinned memory where the device is a GPU."""
    arrays = work[:-2]
    # every array starts at a multiple of 16 bytes
    starts = np.cumsum([0, *(-(-array.size // 4) * 4 for array in arrays)])
    packed = torch.zeros(
        int(starts[-1]), dtype=torch.int32, pin_memory=torch.device(device).type == "cuda"
    )
    host = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        host[start : start + array.size] = array.reshape(-1)
    there = packed.to(device, non_blocking=True)
    narrow, wide, entry_tokens, key_start, key_end, partial_start, num_partials, merged_tokens = (
        there[start : start + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    )
    return DeviceWork(
        narrow, wide, entry_tokens, key_start, key_end, partial_start, num_partials, merged_tokens,
        work.total_partials, work.max_partials,
    )  # fmt: skip


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: DeviceWork,
    *,
    tiling: Tiling,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
    lse: torch.Tensor,
    partials: tuple[torch.Tensor, torch.Tensor] | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Attention of every query token of a step over its sequence's paged keys and values.

    Args:
        q: [num_tokens, num_q_heads, head_dim] fp32, fp16 or bf16, rotated; tokens and heads may be
            strided (a view of a merged tensor), the last dimension is contiguous.
        k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], contiguous, q's dtype,
            float8_e4m3fn (compute capability 8.9 or more) or int8, widened as they are read.
        block_table: [max_slots, max_blocks] int32; only blocks that hold needed keys are read.
        work: of this step and this layer's KV group, made for the same tiling, window and heads.
        tiling: from choose_tiling for this layer.
        scale: multiplies q . k; positive.
        window: the one that `work` was made with.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap); None: unchanged.
        sinks: [num_q_heads] fp32, one more logit per head that takes weight and gives no value.
        out: like q, contiguous, written.
        lse: [num_tokens, num_q_heads] fp32, written: natural log of the sum of exp(score), sinks
            included. A query without keys (and sink) has lse = -inf and out = 0.
        partials: scratch ([n, num_q_heads, head_dim], [n, num_q_heads]) fp32 with
            n >= work.total_partials; None: allocated.
        scales: with int8 caches, and only then: fp32 scales of keys and of values, [num_blocks,
            num_kv_heads, block_size] each, contiguous.
    Raises:
        ShapeError: tensors that disagree in shape or dtype.

    fp32 products are exact fp32 (no tf32); bf16 and fp16 products are summed in fp32. Level
    *rounding*; given 8-bit caches as they are (to store keys so is lossy), 8-bit numbers are exact
    in q's dtype, scales of keys multiply scores, and those of values the weights, in fp32. With
    e4m3 caches bf16 queries become fp16, which holds them exactly between 2^-14 and 65,504.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    _, num_kv_heads, _, k_dim = k_cache.shape
    if (
        k_dim != head_dim
        or v_cache.shape != k_cache.shape
        or not q.dtype == out.dtype
        or k_cache.dtype != v_cache.dtype
        or k_cache.dtype not in (q.dtype, torch.float8_e4m3fn, torch.int8)
        or (scales is not None) != (k_cache.dtype == torch.int8)
        or (scales is not None and not scales[0].shape == scales[1].shape == k_cache.shape[:3])
        or out.shape != q.shape
        or lse.shape != (num_tokens, num_q_heads)
        or len(work.key_end) != num_tokens
        or num_q_heads % num_kv_heads
    ):
        raise ShapeError(
            f"paged_attention: q {tuple(q.shape)} {q.dtype}, k_cache {tuple(k_cache.shape)} "
            f"{k_cache.dtype}, v_cache {tuple(v_cache.shape)} {v_cache.dtype}, out "
            f"{tuple(out.shape)} {out.dtype}, lse {tuple(lse.shape)}, scales "
            f"{None if scales is None else [tuple(x.shape) for x in scales]} and work for "
            f"{len(work.key_end)} tokens disagree"
        )
    if (
        q.stride(2) != 1
        or not out.is_contiguous()
        or not lse.is_contiguous()
        or not k_cache.is_contiguous()
        or not v_cache.is_contiguous()
        or block_table.stride(1) != 1
    ):
        raise ShapeError(
            f"paged_attention: heads of q (strides {q.stride()}), the caches, out and lse must be "
            "contiguous; call .contiguous()"
        )
    if partials is None:
        partials = (
            q.new_empty((work.total_partials, num_q_heads, head_dim), dtype=torch.float32),
            q.new_empty((work.total_partials, num_q_heads), dtype=torch.float32),
        )
    block_d = max(16, triton.next_power_of_2(head_dim))
    for items, shape in ((work.narrow, tiling.narrow), (work.wide, tiling.wide)):
        if len(items):
            _launch(q, k_cache, v_cache, scales or (None, None), block_table, work, items, shape,
                    scale, window is not None, soft_cap, sinks, out, lse, partials,
                    block_d)  # fmt: skip
    if len(work.merged_tokens):
        pieces = min(MAX_MERGED_AT_ONCE, triton.next_power_of_2(work.max_partials))
        _merge[(len(work.merged_tokens), num_q_heads)](
            work.merged_tokens, work.partial_start, work.num_partials, *partials, sinks, out, lse,
            HEAD_DIM=head_dim, BLOCK_D=block_d, PIECES=pieces, SINKS=sinks is not None,
            num_warps=1 if pieces <= 4 else 2 if pieces <= 16 else 4,
        )  # fmt: skip


def _launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    block_table: torch.Tensor,
    work: DeviceWork,
    items: torch.Tensor,
    shape: TileShape,
    scale: float,
    windowed: bool,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    partials: tuple[torch.Tensor, torch.Tensor],
    block_d: int,
) -> None:
    """Run the kernel over items of one tile shape."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    _attend[(len(items) * num_kv_heads,)](
        q, k_cache, v_cache, *scales, block_table, items, work.entry_tokens, work.key_start,
        work.key_end, work.partial_start, sinks, out, lse, *partials,
        scale * LOG2_E if soft_cap is None else scale / soft_cap,
        0.0 if soft_cap is None else soft_cap * LOG2_E,
        q.stride(0), q.stride(1), block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=q.shape[1] // num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_D=block_d, BLOCK_SIZE=block_size, ROWS=shape.num_rows, KEYS=shape.num_keys,
        WINDOWED=windowed, SOFT_CAP=soft_cap is not None, SINKS=sinks is not None,
        SCALED=scales[0] is not None, num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip


@triton.jit
def _attend(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    block_table: tl.tensor,
    items: tl.tensor,
    entry_tokens: tl.tensor,
    key_start: tl.tensor,
    key_end: tl.tensor,
    partial_start: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    score_scale: tl.tensor,
    cap: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """One item and one kv head: rows [ROWS] of tokens x heads over keys [begin, end)."""
    head = tl.program_id(0) % NUM_KV_HEADS  # neighbours: the same blocks, the next piece of each
    item = items + tl.program_id(0) // NUM_KV_HEADS * 8
    first = tl.load(item)
    count = tl.load(item + 1)
    if count == 0:
        return
    table = block_table + tl.load(item + 2).to(tl.int64) * table_stride
    begin = tl.load(item + 3)
    end = tl.load(item + 4)
    full_end = tl.load(item + 5)
    piece = tl.load(item + 6)

    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    live = row // GROUP < count
    token = tl.load(entry_tokens + first + row // GROUP, mask=live, other=0).to(tl.int64)
    q_head = head * GROUP + row % GROUP
    q_rows = tl.load(
        q + (token * q_token_stride + q_head * q_head_stride)[:, None] + d[None, :],
        mask=live[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    if q.dtype.element_ty == tl.bfloat16 and k_cache.dtype.element_ty == tl.float8e4nv:
        # e4m3 to fp16 is one instruction of the card, to bf16 a dozen. Exact for keys and values;
        # for queries see the docstring of paged_attention.
        q_rows = q_rows.to(tl.float16)
    top = tl.full([ROWS], float("-inf"), tl.float32)  # largest score so far
    total = tl.zeros([ROWS], tl.float32)  # sum of exp2(score - top)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)  # sum of weighted values

    # whole tiles of keys that all rows see need no mask
    full_end = begin + (full_end - begin) // KEYS * KEYS
    seen_from = tl.zeros([ROWS], tl.int32)
    seen_to = tl.zeros([ROWS], tl.int32)
    for key in range(begin, full_end, KEYS):
        acc, top, total = _add_tile(
            q_rows, k_cache, v_cache, k_scales, v_scales, table, head, key, begin, end, seen_from,
            seen_to, acc, top, total, score_scale, cap, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE,
            KEYS, False, SOFT_CAP, SCALED,
        )  # fmt: skip
    seen_to = tl.load(key_end + token, mask=live, other=0)
    if WINDOWED:
        seen_from = tl.load(key_start + token, mask=live, other=0)
        begin = tl.min(tl.where(live, seen_from, 2147483647), 0)
    for key in range(full_end, end, KEYS):
        acc, top, total = _add_tile(
            q_rows, k_cache, v_cache, k_scales, v_scales, table, head, key, begin, end, seen_from,
            seen_to, acc, top, total, score_scale, cap, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE,
            KEYS, True, SOFT_CAP, SCALED,
        )  # fmt: skip

    if SINKS and piece < 0:
        sink = tl.load(sinks + q_head, mask=live, other=0.0) * 1.4426950408889634
        top_with_sink = tl.maximum(top, sink)
        shrink = tl.exp2(top - top_with_sink)
        total = total * shrink + tl.exp2(sink - top_with_sink)
        acc = acc * shrink[:, None]
        top = top_with_sink
    # no keys: acc is 0 and top is -inf, as they should be
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row_lse = top + tl.log2(tl.where(total == 0.0, 1.0, total))
    held = live[:, None] & (d < HEAD_DIM)[None, :]
    if piece < 0:
        at = token * (NUM_KV_HEADS * GROUP) + q_head
        tl.store(lse + at, row_lse * 0.6931471805599453, mask=live)
        place = out + (at * HEAD_DIM)[:, None] + d[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=held)
    else:
        start = tl.load(partial_start + token, mask=live, other=0).to(tl.int64)
        at = (start + piece) * (NUM_KV_HEADS * GROUP) + q_head
        tl.store(partial_lse + at, row_lse, mask=live)
        tl.store(partial_out + (at * HEAD_DIM)[:, None] + d[None, :], acc, mask=held)


@triton.jit
def _add_tile(
    q_rows: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    table: tl.tensor,
    head: tl.tensor,
    key: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    seen_from: tl.tensor,
    seen_to: tl.tensor,
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    score_scale: tl.tensor,
    cap: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALED: tl.constexpr,
) -> Any:
    """Add keys [key, key + KEYS) to the running softmax: (acc, top, total)."""
    n = tl.arange(0, KEYS)
    d = tl.arange(0, BLOCK_D)
    keys = key + n
    exists = (keys >= begin) & (keys < end)
    if BLOCK_SIZE % KEYS == 0:  # the tile lies in one block, at 32-bit offsets from one address
        block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
        slot = (block * NUM_KV_HEADS + head) * BLOCK_SIZE + key % BLOCK_SIZE
        slots = slot + n
        k_tile, v_tile = k_cache + slot * HEAD_DIM, v_cache + slot * HEAD_DIM
        at = (n * HEAD_DIM)[:, None] + d[None, :]
    else:
        if MASKED:
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE).to(tl.int64)
        slots = (blocks * NUM_KV_HEADS + head) * BLOCK_SIZE + keys % BLOCK_SIZE
        k_tile, v_tile = k_cache, v_cache
        at = (slots * HEAD_DIM)[:, None] + d[None, :]
    if MASKED:
        held = exists[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_tile + at, mask=held, other=0.0)
        v = tl.load(v_tile + at, mask=held, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        k = tl.load(k_tile + at, mask=(d < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_tile + at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_tile + at)
        v = tl.load(v_tile + at)
    k = k.to(q_rows.dtype)
    v = v.to(q_rows.dtype)
    scores = tl.dot(q_rows, tl.trans(k), input_precision="ieee")  # [ROWS, KEYS] fp32
    if SCALED:
        k_scale = tl.load(k_scales + slots, mask=exists, other=0.0)
        v_scale = tl.load(v_scales + slots, mask=exists, other=0.0)
        scores = scores * k_scale[None, :]
    if SOFT_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right at both ends of exp
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores * (score_scale * 2.8853900817779268)) + 1.0))
        score_scale = 1.0
    if MASKED:
        seen = (keys[None, :] < seen_to[:, None]) & (keys[None, :] >= seen_from[:, None])
        scores = tl.where(seen & exists[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * score_scale)
    shift = new_top
    if MASKED:  # a row that has seen no key yet: -inf minus -inf would be NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * score_scale - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(weights, 1)
    if SCALED:
        weights = weights * v_scale[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def _merge(
    merged_tokens: tl.tensor,
    partial_start: tl.tensor,
    num_partials: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """One token and one head: combine its partial results, as merge_attention of naive.py."""
    token = tl.load(merged_tokens + tl.program_id(0)).to(tl.int64)
    if token < 0:  # fills a captured graph's list up
        return
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    start = tl.load(partial_start + token).to(tl.int64)
    count = tl.load(num_partials + token)
    d = tl.arange(0, BLOCK_D)
    top = float("-inf")
    total = 0.0
    if SINKS:
        top = tl.load(sinks + head) * 1.4426950408889634
        total = 1.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, count, PIECES):
        piece = first + tl.arange(0, PIECES)
        there = piece < count
        at = (start + piece) * num_heads + head
        piece_lse = tl.load(partial_lse + at, mask=there, other=float("-inf"))
        values = tl.load(
            partial_out + (at * HEAD_DIM)[:, None] + d[None, :],
            mask=there[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(piece_lse, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(piece_lse - shift)
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * values, 0)
        top = new_top
    total = tl.where(total == 0.0, 1.0, total)
    at = token * num_heads + head
    tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(out + at * HEAD_DIM + d, (acc / total).to(out.dtype.element_ty), mask=d < HEAD_DIM)
