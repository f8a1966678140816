"""Weights as narrow as their checkpoint has them, joined and laid out for our CPU products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from batchwright.kernels.linear.packing import PackedWeight, pack, pack_blocks
from batchwright.weights.block_tensor import BlockTensor


def pack_stored(weight: torch.Tensor | BlockTensor) -> PackedWeight:
    """Lay out a weight [out_features, in_features]; its fp32 values keep their bits."""
    if isinstance(weight, torch.Tensor):
        return pack(weight)
    if weight.bits == 4:
        weight = weight.from_zero()
    lowest = None if weight.lowest is None else torch.from_numpy(weight.lowest)
    integers, steps = torch.from_numpy(weight.integers), torch.from_numpy(weight.steps)
    return pack_blocks(integers, steps, lowest, weight.bits)


def join_rows(parts: Sequence[torch.Tensor | BlockTensor]) -> torch.Tensor | BlockTensor:
    """The rows of all parts, one below the other, as narrow as all of them can be kept."""
    if len(parts) == 1:
        return parts[0]
    blocks = [part for part in parts if isinstance(part, BlockTensor)]
    if len(blocks) == len(parts):
        return _join_blocks(blocks)
    tensors = [
        torch.from_numpy(part.dense()) if isinstance(part, BlockTensor) else part for part in parts
    ]
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]
    return torch.cat(tensors)


def _join_blocks(parts: list[BlockTensor]) -> BlockTensor:
    block = min(part.block for part in parts)
    if all(part.bits == 4 and part.block == block for part in parts):
        parts = [part.from_zero() for part in parts]
    elif len({(part.bits, part.block, part.lowest is None) for part in parts}) > 1:
        parts = [part.as_bytes(block) for part in parts]
    lowest = [part.lowest for part in parts if part.lowest is not None]
    return BlockTensor(
        parts[0].bits,
        np.concatenate([part.integers for part in parts]),
        np.concatenate([part.steps for part in parts]),
        np.concatenate(lowest) if lowest else None,
    )
