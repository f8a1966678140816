"""GPT-BigCode (StarCoder, arXiv:2305.06161): GPT-2 whose query heads share one key-value head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from batchwright.attention.spec import AttentionSpec
from batchwright.models import gpt2
from batchwright.models.layers import Linear, Parallel


class Attention(gpt2.Attention):
    """Merged as all q, k, v with one key-value head, else as q, k, v of each head in turn."""

    def __init__(self, hidden_size: int, spec: AttentionSpec) -> None:
        super().__init__(hidden_size, spec)
        kv_size = spec.num_kv_heads * spec.head_dim
        self.c_attn = Linear(
            hidden_size, hidden_size + 2 * kv_size, bias=True, parallel=Parallel.COLUMN
        )
        self.is_multi_query = spec.num_kv_heads == 1  # which one of several ranks may have, too

    def heads(self, merged: torch.Tensor) -> tuple[torch.Tensor, ...]:
        num_heads, head_dim = self.spec.num_q_heads, self.spec.head_dim
        if self.is_multi_query:
            return merged.unflatten(-1, (-1, head_dim)).split((num_heads, 1, 1), dim=1)
        return merged.unflatten(-1, (num_heads, 3, head_dim)).unbind(2)


class GPTBigCode(gpt2.GPT2):
    """Weights are stored as [out, in], unlike GPT-2's."""

    defaults = {
        **gpt2.GPT2.defaults,
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": True,
    }

    def num_kv_heads(self) -> int:
        return 1 if self.config["multi_query"] else self.config["num_attention_heads"]

    def attention(self, spec: AttentionSpec) -> nn.Module:
        return Attention(self.config["hidden_size"], spec)

    @classmethod
    def fetch(cls, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        return tensors[name]


Model = GPTBigCode
