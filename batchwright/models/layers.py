"""The pieces all architectures share: Linear, norms, embedding.

`Linear` is the only place where a weight meets an activation, so row padding, merged projections
and later quantisation, sharding and adapters touch this file alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from batchwright.models.functional import add_rms_norm, rms_norm

MIN_ROWS = 12
"""Rows below which BLAS takes other code paths with other rounding (measured on Zen 3 with MKL:
from 12 rows on, a row's bits are the same in every batch). See `row_invariance.py`."""


class Linear(nn.Module):
    """y = x W^T + b, for one projection or several merged ones that read the same input.

    Args:
        in_features: width of x.
        outputs: width of y, or the checkpoint's projection names and widths, merged in this
            order: `Linear(576, {"q_proj": 576, "k_proj": 192, "v_proj": 192})`.
        bias: whether the checkpoint has one for every projection.

    Shapes: x [num_tokens, in_features], y [num_tokens, sum of widths], x's dtype.
    Attributes:
        min_rows: smaller products are padded with zero rows to this many.
        tile_rows: if set, every product has exactly this many rows, padded at the end.

    Level bits: a row of y does not depend on the other rows (contract 1), where the BLAS at hand
    keeps to that; `row_invariance.py` checks it at start-up and sets both attributes.
    """

    def __init__(
        self, in_features: int, outputs: int | Mapping[str, int], *, bias: bool = False
    ) -> None:
        super().__init__()
        self.parts = dict(outputs) if isinstance(outputs, Mapping) else {}
        out_features = sum(self.parts.values()) if self.parts else outputs
        assert isinstance(out_features, int)
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.min_rows = MIN_ROWS
        self.tile_rows: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        if self.tile_rows is not None:
            return self._tiled(x, self.tile_rows)
        if num_rows < self.min_rows:
            x = F.pad(x, (0, 0, 0, self.min_rows - num_rows))
        return F.linear(x, self.weight, self.bias)[:num_rows]

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """forward(x) cut into the merged projections, as views."""
        return self(x).split(list(self.parts.values()), dim=-1)

    def _tiled(self, x: torch.Tensor, tile_rows: int) -> torch.Tensor:
        num_rows = x.shape[0]
        x = F.pad(x, (0, 0, 0, -num_rows % tile_rows))
        tiles = [F.linear(tile, self.weight, self.bias) for tile in x.split(tile_rows)]
        return torch.cat(tiles)[:num_rows]


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
    """Rows of a table by id, times `scale` (Gemma), which is first rounded to the table's dtype."""

    def __init__(
        self, num_embeddings: int, hidden_size: int, *, scale: float | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, hidden_size), requires_grad=False)
        self.scale = scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [num_tokens] int64 -> [num_tokens, hidden_size]."""
        rows = F.embedding(ids, self.weight)
        if self.scale is None:
            return rows
        return rows * float(torch.tensor(self.scale, dtype=rows.dtype))
