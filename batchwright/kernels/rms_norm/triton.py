"""RMS norm with the residual sum that precedes it, on a GPU (arXiv:1910.07467).

Bound by bandwidth: x and the residual are read once, the sum and the result written once.
Exactness level *bits* in itself: a row is reduced in one program, in an order that its width alone
decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batchwright.errors import ShapeError

ELEMENTS_PER_PROGRAM = 2048
"""Short rows (heads) share a program up to this many elements."""


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
) -> None:
    """out = norm(x) * weight, or with residual: residual += x; out = norm(residual) * weight.

    Args:
        x: [num_tokens, hidden_size] or [num_tokens, num_heads, head_dim], fp32, fp16 or bf16; the
            last dimension is contiguous and normalised, the others may be strided.
        weight: [hidden_size], any float dtype.
        out: like x, written; it may be x itself.
        residual: like x; updated in place to the sum that is normalised.
        unit_offset: multiply by (1 + weight), as Gemma does.
    Raises:
        ShapeError: shapes disagree or the last dimension is not contiguous.

    All arithmetic is in fp32. The sum is rounded to the residual's dtype before it is normalised,
    as transformers does; the result is rounded once, where transformers rounds twice.
    """
    if x.ndim == 2:
        x, out = x[:, None], out[:, None]
        residual = residual if residual is None else residual[:, None]
    total = x if residual is None else residual
    if not x.shape == out.shape == total.shape or weight.shape != x.shape[2:]:
        raise ShapeError(
            f"rms_norm: x {tuple(x.shape)}, out {tuple(out.shape)}, residual "
            f"{tuple(total.shape)} and weight {tuple(weight.shape)} disagree"
        )
    num_tokens, num_heads, size = x.shape
    if not x.stride(2) == out.stride(2) == total.stride(2) == weight.stride(0) == 1 and size > 1:
        raise ShapeError("rms_norm: the last dimension must be contiguous; call .contiguous()")
    num_rows = num_tokens * num_heads
    if num_rows == 0:
        return
    block = triton.next_power_of_2(size)
    rows = max(1, ELEMENTS_PER_PROGRAM // block) if num_heads > 1 else 1
    _rms_norm[(triton.cdiv(num_rows, rows),)](
        x, total, weight, out, eps, num_rows, num_heads,
        *x.stride()[:2], *total.stride()[:2], *out.stride()[:2],
        SIZE=size, BLOCK=block, ROWS=rows, RESIDUAL=residual is not None,
        UNIT_OFFSET=unit_offset, num_warps=min(16, max(4, rows * block // 512)),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    x_token_stride: tl.tensor,
    x_head_stride: tl.tensor,
    residual_token_stride: tl.tensor,
    residual_head_stride: tl.tensor,
    out_token_stride: tl.tensor,
    out_head_stride: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // num_heads).to(tl.int64), row % num_heads
    d = tl.arange(0, BLOCK)
    held = (row < num_rows)[:, None] & (d < SIZE)[None, :]
    at = (token * x_token_stride + head * x_head_stride)[:, None] + d[None, :]
    total = tl.load(x + at, mask=held, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=d < SIZE, other=0.0).to(tl.float32)
    if RESIDUAL:
        at = (token * residual_token_stride + head * residual_head_stride)[:, None] + d[None, :]
        total += tl.load(residual + at, mask=held, other=0.0).to(tl.float32)
        rounded = total.to(residual.dtype.element_ty)
        tl.store(residual + at, rounded, mask=held)
        total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 1) / SIZE + eps)
    if UNIT_OFFSET:
        w += 1.0
    at = (token * out_token_stride + head * out_head_stride)[:, None] + d[None, :]
    tl.store(out + at, (total * scale[:, None] * w[None, :]).to(out.dtype.element_ty), mask=held)
