"""Readable twin of rms_norm: torch, any float dtype."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise x (+ residual) over its last dimension to root mean square 1, times weight.

    Args:
        x: [..., hidden_size].
        weight: [hidden_size].
        residual: added to x first, same shape.
        unit_offset: multiply by (1 + weight), as Gemma does.
    Returns:
        (the normalised sum, the sum), both of x's shape.
    """
    total = x if residual is None else x + residual
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    return total * scale * (1 + weight if unit_offset else weight), total
