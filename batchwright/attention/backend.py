"""The backend seam: what an attention implementation offers the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from batchwright.attention.spec import AttentionSpec
from batchwright.request import Int32Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupBatch:
    """The KV side of a step for one KV group.

    Attributes:
        block_table: [max_num_seqs, max_blocks] int32, all slots; rows pick theirs by `slots`.
        slot_mapping: [num_tokens] int32, where each token's KV goes, or NO_WRITE.
    """

    block_table: Int32Array
    slot_mapping: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionBatch:
    """What every layer of a step shares, as numpy arrays.

    Attributes:
        slots: [num_rows] int32.
        cu_seqlens_q: [num_rows + 1] int32.
        positions: [num_tokens] int32, indices in the sequence; a token sees keys <= its own.
        position_ids: [num_tokens] int32 to rotate by; equal to positions, save in prompts with a
            layout.
        groups: one per KV group.
        block_size: tokens per block.
    """

    slots: Int32Array
    cu_seqlens_q: Int32Array
    positions: Int32Array
    position_ids: Int32Array
    groups: tuple[GroupBatch, ...]
    block_size: int


class KVLayer(Protocol):
    """KV of one layer. The backend owns the layout; blocks and tokens can be copied."""

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks: pairs [n, 2] of (source, destination); sources are read first."""
        ...

    def copy_tokens(self, pairs: Int32Array) -> None:
        """Copy single tokens: pairs [n, 2] of KV slots; no source is a destination."""
        ...


class AttentionBackend(Protocol):
    """Rotates, writes KV and attends for one layer of a ragged step."""

    def element_bytes(self, dtype: torch.dtype, head_dim: int) -> float:
        """Bytes that a component of a key or value of a model of `dtype` takes, with its share of
        what is kept once for all of a head's."""
        ...

    def allocate(
        self, spec: AttentionSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVLayer:
        """KV memory of one layer of a model of `dtype`; pages are touched when first written."""
        ...

    def rows_per_load(self, num_q_heads: int, num_kv_heads: int) -> int:
        """Tokens of rows that share keys, that use these while they are loaded once; 1: none."""
        ...

    def plan(self, batch: AttentionBatch) -> Any:
        """Work shared by all layers of a step, done once."""
        ...

    def run(
        self,
        spec: AttentionSpec,
        group: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: Any,
        plan: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's k and v, then attend.

        Args:
            q: [num_tokens, num_q_heads, head_dim], not rotated; may be overwritten.
            k, v: [num_tokens, num_kv_heads, head_dim], not rotated; may be overwritten.
            kv: this layer's KV memory from `allocate`.
            plan: from `plan`.
        Returns:
            (out, lse): out as q; lse [num_tokens, num_q_heads] fp32, natural log of the sum of
            exponentiated scores, so that attention over disjoint key sets can be merged.
        """
        ...


def block_bytes(spec: AttentionSpec, block_size: int, element_bytes: float) -> int:
    """Bytes of one block of one layer, keys and values, whose components take `element_bytes`."""
    return round(2 * spec.num_kv_heads * spec.head_dim * block_size * element_bytes)


def view_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same memory as a numpy array (CPU tensors)."""
    return tensor.detach().numpy()
