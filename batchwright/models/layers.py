"""The pieces all architectures share: Linear, norms, embedding.

`Linear` is the only place where a weight meets an activation, so row padding, merged projections
and later quantisation, sharding and adapters touch this file alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from batchwright.kernels.linear import numba as linear_kernel
from batchwright.kernels.linear.packing import pack, packed_rows
from batchwright.models.functional import add_rms_norm, rms_norm

_NO_BIAS = torch.empty(0)


class Linear(nn.Module):
    """y = x W^T + b, for one projection or several merged ones that read the same input.

    Args:
        in_features: width of x.
        outputs: width of y, or the checkpoint's projection names and widths, merged in this
            order: `Linear(576, {"q_proj": 576, "k_proj": 192, "v_proj": 192})`.
        bias: whether the checkpoint has one for every projection.

    Shapes: x [num_tokens, in_features], y [num_tokens, sum of widths], x's dtype.
    Attributes:
        weight: [out_features, in_features]; after `pack`, in the layout of our own CPU kernel.

    Level bits when packed: a row of y does not depend on the other rows (contract 1). torch's own
    products, which compute all others, do not promise that.
    """

    def __init__(
        self, in_features: int, outputs: int | Mapping[str, int], *, bias: bool = False
    ) -> None:
        super().__init__()
        self.parts = dict(outputs) if isinstance(outputs, Mapping) else {}
        self.in_features = in_features
        self.out_features = sum(outputs.values()) if isinstance(outputs, Mapping) else outputs
        weight = torch.empty(self.out_features, in_features)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(self.out_features), requires_grad=False) if bias else None
        )

    def pack(self) -> None:
        """Lay the weight out for our own kernel, which multiplies in fp32 on the CPU; once."""
        assert self.weight.ndim == 2, "packed already"
        self.weight = nn.Parameter(pack(self.weight), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        out = torch.empty(x.shape[0], self.out_features)
        bias = _NO_BIAS if self.bias is None else self.bias
        linear_kernel.linear(x.contiguous().numpy(), self.weight.numpy(), bias.numpy(), out.numpy())
        return out

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """forward(x) cut into the merged projections, as views."""
        return self(x).split(list(self.parts.values()), dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467); `unit_offset` multiplies by 1 + weight (Gemma)."""

    def __init__(self, hidden_size: int, eps: float, *, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps
        self.unit_offset = unit_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] -> the same shape and dtype; the mean is taken in fp32."""
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)

    def after_sum(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(forward(residual + x), residual + x); `residual` may be overwritten."""
        assert not self.unit_offset
        return add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm (arXiv:1607.06450), with weight and bias unless `affine` is False."""

    def __init__(self, hidden_size: int, eps: float, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = self.bias = None
        if affine:
            self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
            self.bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] -> the same shape and dtype."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    """Rows of a table by id, times `scale` (Gemma), which is first rounded to the table's dtype.

    The table may be the packed weight of the output head.
    """

    def __init__(
        self, num_embeddings: int, hidden_size: int, *, scale: float | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, hidden_size), requires_grad=False)
        self.scale = scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [num_tokens] int64 -> [num_tokens, hidden_size]."""
        packed = self.weight.ndim == 3
        rows = packed_rows(self.weight, ids) if packed else F.embedding(ids, self.weight)
        if self.scale is None:
            return rows
        return rows * float(torch.tensor(self.scale, dtype=rows.dtype))
