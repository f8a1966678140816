"""The layout in which fp32 weights are kept for products on CPU: panels of 32 output columns.

A panel holds, for each input feature, the weights of 32 outputs side by side: one vector load gives
what 32 chains of multiply-adds need next, and a panel is read from beginning to end. Packed weights
take the place of a checkpoint's, there is no second copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

PANEL = 32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[out_features, in_features] -> [ceil(out_features / 32), in_features, 32], contiguous.

    Columns beyond out_features are zero. The values and the dtype stay.
    """
    out_features, in_features = weight.shape
    weight = F.pad(weight, (0, 0, 0, -out_features % PANEL))
    return weight.view(-1, PANEL, in_features).transpose(1, 2).contiguous()


def unpack(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """The weight [out_features, in_features] that `pack` was given."""
    return packed.transpose(1, 2).flatten(0, 1)[:out_features].contiguous()


def packed_rows(packed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` [num] int64 of the weight, e.g. embeddings that are tied to the output head.

    Returns [num, in_features].
    """
    return packed[ids // PANEL, :, ids % PANEL]
