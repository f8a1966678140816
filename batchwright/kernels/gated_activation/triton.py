"""Activations of feed-forward layers on a GPU: act(gate) * up on merged rows, or act(x).

Bound by bandwidth: one pass, eight elements a thread. Exactness level *bits*: elementwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batchwright.errors import ConfigError, ShapeError

KINDS = ("silu", "gelu", "gelu_tanh", "relu")
BLOCK = 1024


def gated_activation(x: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """out = activation(gate) * up.

    Args:
        x: [num_tokens, 2 * size] fp32, fp16 or bf16, gate then up; rows contiguous in themselves.
        kind: silu, gelu, gelu_tanh or relu.
        out: [num_tokens, size], x's dtype, written.
    Raises:
        ConfigError: unknown kind.
        ShapeError: shapes disagree or rows are not contiguous.

    Computed in fp32 and rounded once.
    """
    if x.shape != (len(out), 2 * out.shape[1]):
        raise ShapeError(
            f"gated_activation: x {tuple(x.shape)} is not twice as wide as out {tuple(out.shape)}"
        )
    _run(x, kind, True, out)


def activation(x: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """out = activation(x), both [num_tokens, size]; out may be x. As gated_activation otherwise."""
    if x.shape != out.shape:
        raise ShapeError(f"activation: x {tuple(x.shape)} and out {tuple(out.shape)} disagree")
    _run(x, kind, False, out)


def _run(x: torch.Tensor, kind: str, gated: bool, out: torch.Tensor) -> None:
    if kind not in KINDS:
        raise ConfigError(f"activation is {kind!r}; supported: {', '.join(KINDS)}")
    if not x.stride(1) == out.stride(1) == 1:
        raise ShapeError("activation: rows must be contiguous; call .contiguous()")
    num_rows, size = out.shape
    if out.numel():
        # rows on the first axis of the grid: the others end at 65,535
        _activation[(num_rows, triton.cdiv(size, BLOCK))](
            x, out, size, x.stride(0), out.stride(0), KIND=kind, GATED=gated, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip


@triton.jit
def _activation(
    x: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < size
    gate = tl.load(x + row * x_stride + column, mask=held, other=0.0).to(tl.float32)
    if KIND == "silu":
        value = gate / (1.0 + tl.exp(-gate))
    elif KIND == "gelu":
        value = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) is the logistic function of 2 y
        y = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        value = gate / (1.0 + tl.exp(-2.0 * y))
    else:
        value = tl.where(gate < 0.0, 0.0, gate)  # a NaN stays one
    if GATED:
        value *= tl.load(x + row * x_stride + size + column, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=held)
