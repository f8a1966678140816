"""DeviceWork: a WorkList as tensors, what the GPU kernel and its twin read."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWork:
    """A WorkList as int32 tensors on the device; see there. All are views of one buffer.

    In a captured graph the lists have a fixed length: items of no entries and merged tokens of -1
    do nothing.
    """

    narrow: torch.Tensor
    wide: torch.Tensor
    entry_tokens: torch.Tensor
    key_start: torch.Tensor
    key_end: torch.Tensor
    partial_start: torch.Tensor
    num_partials: torch.Tensor
    merged_tokens: torch.Tensor
    total_partials: int
    max_partials: int
