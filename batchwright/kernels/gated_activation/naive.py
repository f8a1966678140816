"""Readable twin of the activations: torch, any float dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """silu, gelu, gelu_tanh or relu of x, elementwise."""
    match kind:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
    raise ValueError(f"unknown activation {kind!r}")


def gated_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """activation(gate) * up, where x [..., 2 * size] holds gate and then up."""
    gate, up = x.chunk(2, dim=-1)
    return activation(gate, kind) * up
