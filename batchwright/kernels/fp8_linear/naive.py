"""Products in 8-bit floating point (e4m3), the readable twin (arXiv:2209.05433).

Weights have a scale for each output channel, activations one for each token: never one for several
tokens, so no row can change another. A scale maps the largest magnitude of its channel or token to
the largest that e4m3 has. Sums are fp32.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
MAX_FP8 = 448.0
"""The largest number that e4m3fn has."""
SIZE_MULTIPLE = 16
"""What inputs and outputs of a product must be multiples of, for the tensor cores' sake."""


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in e4m3, and their scales.

    Args:
        x: [num_rows, size] fp32, fp16 or bf16.
    Returns:
        ([num_rows, size] e4m3fn, [num_rows, 1] fp32): x is about values * scales, to 1 part in 16
        of each number, and of numbers below 2^-14 of the row's largest to that share of it. A row
        of zeros, or of numbers so small that its scale would be 0, has scale 1; one with an
        infinity or NaN has a NaN.
    """
    x = x.float()
    largest = x.abs().amax(1, keepdim=True)
    scales = largest * (1.0 / MAX_FP8)
    scales = torch.where(scales == 0.0, 1.0, scales)
    values = (x / scales).clamp(-MAX_FP8, MAX_FP8)  # a quotient may round to more; NaN stays NaN
    return values.to(FP8), scales


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + b, with x quantised as it comes.

    Args:
        x: [num_rows, in_features] fp32, fp16 or bf16.
        weight: [out_features, in_features] e4m3fn, from quantize_rows.
        scales: [out_features, 1] fp32, likewise.
        bias: [out_features], x's dtype.
    Returns:
        [num_rows, out_features], x's dtype, rounded once.
    """
    values, row_scales = quantize_rows(x)
    y = values.float() @ weight.float().T * row_scales * scales.T
    return (y if bias is None else y + bias.float()).to(x.dtype)
