"""Row-wise functions of the models, torch in and out: norm and activations.

On CPU in fp32 they run in Numba kernels, on a GPU in Triton's, else in torch. Level bits in all:
every row has the same bits in any batch. torch's own silu and gelu_tanh do not give that: the last
few elements of each thread's share take a scalar path with other rounding (measured: widths 40, 48,
50 and 97 differ). exp, tanh and erf do, so activations are composed of them here.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch

from batchwright.kernels.fp8_linear import naive as fp8_naive
from batchwright.kernels.gated_activation import numba as activation_kernel
from batchwright.kernels.parallel import scratch
from batchwright.kernels.rms_norm import numba as norm_kernel


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32.

    Args:
        x: [num_tokens, hidden_size] or [num_tokens, num_heads, head_dim], also as a view.
        unit_offset: multiply by 1 + weight, in fp32, before rounding to x's dtype (Gemma).
    """
    if _has_kernel(x):
        out = scratch(x.shape, np.float32)
        norm_kernel.rms_norm(x.numpy(), weight.detach().numpy(), eps, out, unit_offset=unit_offset)
        return torch.from_numpy(out)
    if x.is_cuda:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _gpu("rms_norm").rms_norm(x, weight, eps, out, unit_offset=unit_offset)
        return out
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (x32 * (1.0 + weight.float())).to(x.dtype)
    return weight * x32.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(residual + x), residual + x), both [num_tokens, hidden_size].

    One pass where there is a kernel, and `residual` is overwritten with the sum.
    """
    if _has_kernel(x):
        out = scratch(x.shape, np.float32)
        norm_kernel.rms_norm(x.numpy(), weight.numpy(), eps, out, residual=residual.numpy())
        return torch.from_numpy(out), residual
    if x.is_cuda:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _gpu("rms_norm").rms_norm(x, weight, eps, out, residual=residual)
        return out, residual
    total = residual + x
    return rms_norm(total, weight, eps), total


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + b with weights in e4m3, and x quantised row by row; see kernels/fp8_linear."""
    kernel = _gpu("fp8_linear") if x.is_cuda else fp8_naive
    y: torch.Tensor = kernel.fp8_linear(x, weight, scales, bias)
    return y


def relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0), elementwise."""
    return torch.relu(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x * Phi(x) with the exact normal distribution function (arXiv:1606.08415), in fp32.

    Like all functions here, x is [num_tokens, width] and the result has its dtype.
    """
    return _activation(x, "gelu") if _has_activation(x) else _gelu(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh approximation, elementwise, in fp32."""
    return _activation(x, "gelu_tanh") if _has_activation(x) else _gelu_tanh(x)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for a merged [num_tokens, 2 * width] -> [num_tokens, width]."""
    if _has_activation(gate_up):
        return _gated_activation(gate_up, "silu")
    gate, up = gate_up.chunk(2, dim=-1)
    return _silu(gate) * up


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(gate) * up for a merged [num_tokens, 2 * width] -> [num_tokens, width]."""
    if _has_activation(gate_up):
        return _gated_activation(gate_up, "gelu_tanh")
    gate, up = gate_up.chunk(2, dim=-1)
    return _gelu_tanh(gate) * up


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap): the identity near zero, never beyond +-cap. Overwrites x."""
    return x.div_(cap).tanh_().mul_(cap)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": relu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}
"""Elementwise activations by their names in config.json."""

GATED_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
}
"""Gated activations of merged projections, by config.json's name of the gate's function."""


def _has_kernel(x: torch.Tensor) -> bool:
    """Whether Numba computes it."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _has_activation(x: torch.Tensor) -> bool:
    """Whether Numba or Triton computes it."""
    return x.is_cuda or _has_kernel(x)


@functools.cache
def _gpu(kernel: str) -> ModuleType:
    """The Triton kernels of a folder; Triton is needed only where there is a GPU."""
    return importlib.import_module(f"batchwright.kernels.{kernel}.triton")


def _activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    if x.is_cuda:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _gpu("gated_activation").activation(x, kind, out)
        return out
    activated = scratch(x.shape, np.float32)
    activation_kernel.activation(x.numpy(), kind, activated)
    return torch.from_numpy(activated)


def _gated_activation(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    shape = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.is_cuda:
        out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
        _gpu("gated_activation").gated_activation(gate_up, kind, out)
        return out
    activated = scratch(shape, np.float32)
    activation_kernel.gated_activation(gate_up.numpy(), kind, activated)
    return torch.from_numpy(activated)


def _silu(x: torch.Tensor) -> torch.Tensor:
    x32 = x.float()
    return (x32 / torch.neg(x32).exp_().add_(1.0)).to(x.dtype)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    x32 = x.float()
    return (0.5 * x32 * torch.mul(x32, math.sqrt(0.5)).erf_().add_(1.0)).to(x.dtype)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    x32 = x.float()
    inner = (x32 * x32 * x32).mul_(0.044715).add_(x32).mul_(math.sqrt(2.0 / math.pi))
    return (0.5 * x32 * inner.tanh_().add_(1.0)).to(x.dtype)
