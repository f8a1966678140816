"""Readable twin of linear: torch, any float dtype."""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b.

    Args:
        x: [num_tokens, in_features].
        weight: [out_features, in_features].
        bias: [out_features].
    Returns:
        [num_tokens, out_features].
    """
    y = x @ weight.T
    return y if bias is None else y + bias
