"""What a layer tells the attention context: AttentionSpec, RotaryTable, and attend()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTable:
    """Rotary position embedding (RoFormer, arXiv:2104.09864) for every position of the context.

    Attributes:
        cos, sin: [max_positions, rotary_dim / 2] fp32. Entry (p, i) turns pair i at position p.
            Kept in fp32 for every model dtype: bf16 angles lose the low bits of the position.
        interleaved: pairs are (2i, 2i+1) instead of (i, i + rotary_dim / 2).

    Dimensions at and above rotary_dim are left as they are.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False

    @property
    def rotary_dim(self) -> int:
        """Number of leading head dimensions that are rotated."""
        return 2 * self.cos.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionSpec:
    """How one layer attends. Frozen: built once with the model, read by every backend.

    Attributes:
        layer: index of the layer, also of its KV array.
        scale: factor of the scores, usually head_dim ** -0.5.
        rotary: table to rotate q and k with; None if the model adds positions elsewhere.
        window: a query at position p sees keys in (p - window, p]; None sees all up to p.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2).
    """

    layer: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotary: RotaryTable | None = None
    window: int | None = None
    soft_cap: float | None = None


class Attend(Protocol):
    """The context a model calls once per layer: rotates, writes KV, attends."""

    def __call__(
        self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attention output of the step's tokens.

        Args:
            q: [num_tokens, num_q_heads, head_dim], not rotated; may be overwritten.
            k, v: [num_tokens, num_kv_heads, head_dim], not rotated; may be overwritten. All three
                may be views of one merged tensor; the last dimension is contiguous.
        Returns:
            [num_tokens, num_q_heads * head_dim], q's dtype.
        """
        ...
