"""Readable twin of int8_linear: torch, integer sums in int64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from batchwright.kernels.int8_linear.packing import BLOCK

SMALLEST = 1e-30
"""A block whose magnitudes are all smaller counts as zero."""


def quantize_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block of 128 activations symmetric by its own largest magnitude.

    Args:
        x: [num_tokens, in_features] fp32.
        bits: 8: values from -127 to 127; 7: from -63 to 63.
    Returns:
        (values [num_tokens, blocks, 128] int64, scales [num_tokens, blocks] fp32): x is about their
        product, with zeros behind its end. A scale is NaN where a block has an infinity or NaN.
    """
    levels = 2 ** (bits - 1) - 1
    x = F.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = x.abs().amax(dim=-1)
    largest = largest.where(largest.isfinite(), torch.nan)
    steps = torch.full_like(largest, levels) / largest  # an integer / tensor is rounded twice
    inverse = torch.where(largest < SMALLEST, 0.0, steps)
    values = (x * inverse[..., None]).round().nan_to_num(0.0, 0.0, 0.0)  # to even, as the kernel
    return values.long(), torch.where(largest < SMALLEST, 0.0, largest / levels)


def int8_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int = 8,
) -> torch.Tensor:
    """x W^T + b with W = values * scales and activations of 8 or 7 bits.

    Args:
        x: [num_tokens, in_features] fp32.
        values: [out_features, in_features] int8.
        scales: [out_features] fp32.
        bias: [out_features] fp32.
    Returns:
        [num_tokens, out_features] fp32: exact integer sums of the blocks, each times its scale,
        added up in their order and rounded once for each, times the output's scale, plus the bias.
    """
    rows, row_scales = quantize_rows(x, bits)
    weights = F.pad(values, (0, -values.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).long()
    y = torch.zeros(len(x), len(values))
    for block in range(rows.shape[1]):
        sums = rows[:, block] @ weights[:, block].T
        y = (y.double() + sums.double() * row_scales[:, block, None].double()).float()
    y = y * scales
    return y if bias is None else y + bias
