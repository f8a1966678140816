"""Qwen3 (arXiv:2505.09388): q and k are normalised per head; Qwen2's windows, no biases."""

from __future__ import annotations

import torch
from torch import nn

from batchwright.attention.spec import AttentionSpec
from batchwright.models import llama
from batchwright.models.layers import RMSNorm
from batchwright.models.qwen2 import Qwen2


class NormedAttention(llama.Attention):
    """Grouped-query attention with an RMSNorm over each head of q and of k, before the rotation."""

    def __init__(
        self,
        hidden_size: int,
        spec: AttentionSpec,
        eps: float,
        *,
        bias: bool = False,
        unit_offset: bool = False,
    ) -> None:
        super().__init__(hidden_size, spec, qkv_bias=bias, o_bias=bias)
        self.q_norm = RMSNorm(spec.head_dim, eps, unit_offset=unit_offset)
        self.k_norm = RMSNorm(spec.head_dim, eps, unit_offset=unit_offset)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3(Qwen2):
    """All published sizes name their `head_dim`; it is not hidden_size / num_attention_heads."""

    defaults = {**Qwen2.defaults, "head_dim": 128}

    def attention(self, spec: AttentionSpec) -> nn.Module:
        config = self.config
        return NormedAttention(
            config["hidden_size"], spec, config["rms_norm_eps"], bias=config["attention_bias"]
        )


Model = Qwen3
