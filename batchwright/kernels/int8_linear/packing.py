"""Weights as int8 for products on CPU: panels of 32 outputs x groups of 4 inputs.

The vector units multiply four neighbouring bytes and add the products to one int32, so a panel
holds, for each four input features, the weights of 32 outputs side by side. One of the factors must
be unsigned: weights are stored with 128 added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

PANEL = 32
GROUP = 4
LARGEST = 127
"""Of a quantised weight; -128 is not used, so that weights are symmetric."""

ZERO = 128
"""What a weight of zero is stored as."""

BLOCK = 128
"""Input features of a row that share a scale; a power of two of whole groups. An outlier makes the
steps of its own block coarse, not those of the whole row."""


class Int8Weight(NamedTuple):
    """A weight [out_features, in_features], quantised and laid out.

    Attributes:
        values: [ceil(out_features / 32), ceil(in_features / 4), 32, 4] uint8, with 128 added; 128
            where there is no output or input.
        scales: [values.shape[0] * 32] fp32: a weight is its value times the scale of its output.
    """

    values: torch.Tensor
    scales: torch.Tensor


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [out_features, in_features] int8, scales [out_features] fp32) of an fp32 weight.

    Symmetric, per output: its largest magnitude becomes 127, others are rounded to nearest. An
    output whose weights are all below 1e-30 becomes zero.
    """
    largest = weight.abs().amax(dim=1)
    scales = torch.where(largest < 1e-30, 0.0, largest / LARGEST)
    values = (weight / scales.where(scales > 0, 1.0)[:, None]).round_()
    return values.where(scales[:, None] > 0, 0.0).to(torch.int8), scales


def pack(values: torch.Tensor, scales: torch.Tensor) -> Int8Weight:
    """Lay out what `quantize_weight` returned."""
    out_features, in_features = values.shape
    values = F.pad(values, (0, -in_features % GROUP, 0, -out_features % PANEL))
    panels = values.view(-1, PANEL, values.shape[1] // GROUP, GROUP).transpose(1, 2).contiguous()
    stored = panels.view(torch.uint8).bitwise_xor_(ZERO)  # two's complement with 128 added
    return Int8Weight(stored, F.pad(scales, (0, -out_features % PANEL)))


def unpack(weight: Int8Weight, out_features: int, in_features: int) -> torch.Tensor:
    """The values [out_features, in_features] int8 that `pack` was given."""
    values = weight.values.bitwise_xor(ZERO).view(torch.int8)
    rows = values.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows[:out_features, :in_features].contiguous()


def blank(out_features: int, in_features: int) -> Int8Weight:
    """A weight that means nothing, for measuring time."""
    panels = -(-out_features // PANEL)
    values = torch.ones(panels, -(-in_features // GROUP), PANEL, GROUP, dtype=torch.uint8)
    return Int8Weight(values, torch.full((panels * PANEL,), 0.01))
