"""DeviceKV: keys and values of all layers on a device, and copies of their blocks and tokens.

One tensor a KV group, [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim], so that
copying a block in all layers is one operation; in int8 another one with the scales, without the
last dimension. 8-bit floats are copied as bytes: torch has no such operations on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from batchwright.attention.spec import AttentionSpec
from batchwright.exec.device.host_blocks import HostBlocks
from batchwright.kv.groups import KVGroup

EIGHT_BIT_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""By kv_cache_dtype."""


class LayerKV(NamedTuple):
    """Keys and values of one layer, [num_blocks, num_kv_heads, block_size, head_dim] each.

    Attributes:
        scales: of int8 keys and values, fp32 without the last dimension; else None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None


def element_bytes(kv_cache_dtype: str, dtype: torch.dtype, head_dim: int) -> float:
    """Bytes of a component of a key or value, with its share of a scale.

    Args:
        dtype: the model's.
    """
    if kv_cache_dtype not in EIGHT_BIT_DTYPES:
        return float(dtype.itemsize)
    return 1 + 4 / head_dim if kv_cache_dtype == "int8" else 1.0


class DeviceKV:
    """See the module docstring.

    Args:
        specs: of all layers.
        group_of_layer: KV group of each.
        block_size: tokens per block.
        dtype: of keys and values.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        group_of_layer: Sequence[int],
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._specs, self._group_of_layer = specs, group_of_layer
        self._block_size, self._dtype, self._device = block_size, dtype, device
        self._hosts: list[HostBlocks] = []
        self.layers: list[LayerKV] = []
        self.parts: list[list[torch.Tensor]] = []
        """Of each KV group: the numbers, as bytes if they are 8-bit floats, and scales if any."""

    def allocate(self, groups: Sequence[KVGroup]) -> None:
        """Take memory, in place of what there was. Room on the host is made once."""
        self.clear()
        numbers: list[torch.Tensor] = []
        for group, kv_group in enumerate(groups):
            mine = [
                spec
                for spec, own in zip(self._specs, self._group_of_layer, strict=True)
                if own == group
            ]
            heads = {(spec.num_kv_heads, spec.head_dim) for spec in mine}
            assert len(heads) == 1, "layers of one KV group have the same heads"
            num_kv_heads, head_dim = heads.pop()
            tokens = len(mine), 2, kv_group.num_blocks, num_kv_heads, self._block_size
            numbers.append(torch.empty(*tokens, head_dim, dtype=self._dtype, device=self._device))
            is_float8 = self._dtype == torch.float8_e4m3fn
            self.parts.append([numbers[-1].view(torch.uint8) if is_float8 else numbers[-1]])
            if self._dtype == torch.int8:
                scales = torch.empty(tokens, dtype=torch.float32, device=self._device)
                self.parts[-1].append(scales)
        self._divide(numbers)
        if groups[0].num_host_blocks and not self._hosts:
            num_host_blocks = groups[0].num_host_blocks
            self._hosts = [HostBlocks(part, num_host_blocks) for part in self.parts[0]]

    def _divide(self, numbers: Sequence[torch.Tensor]) -> None:
        """The layers' parts of the memory of groups."""
        counts = [0] * len(numbers)
        for group in self._group_of_layer:
            index, parts = counts[group], self.parts[group]
            keys, values = numbers[group][index]
            scales = (parts[1][index][0], parts[1][index][1]) if len(parts) > 1 else None
            self.layers.append(LayerKV(keys, values, scales))
            counts[group] += 1

    def clear(self) -> None:
        """Give the memory back."""
        self.parts.clear()
        self.layers.clear()

    def copy_blocks(self, group: int, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy blocks of a group, all sources first; arguments [n] int64 on the device."""
        for part in self.parts[group]:
            part.index_copy_(2, destination, part.index_select(2, source))

    def copy_tokens(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy single tokens of the only group, by KV slot; no source is a destination."""
        block, to_block = source // self._block_size, destination // self._block_size
        offset, to_offset = source % self._block_size, destination % self._block_size
        for part in self.parts[0]:
            part[:, :, to_block, :, to_offset] = part[:, :, block, :, offset]

    def save(self, block_ids: torch.Tensor, host_ids: list[int]) -> None:
        """See `HostBlocks`."""
        for part, host in zip(self.parts[0], self._hosts, strict=True):
            host.save(part, block_ids, host_ids)

    def load(self, host_ids: list[int], block_ids: torch.Tensor) -> None:
        """See `HostBlocks`."""
        for part, host in zip(self.parts[0], self._hosts, strict=True):
            host.load(part, host_ids, block_ids)
