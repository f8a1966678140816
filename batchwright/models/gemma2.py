"""Gemma 2 (arXiv:2408.00118): norms before and after each block, alternating windows, soft caps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from batchwright.attention.spec import Attend, AttentionSpec, RotaryTable
from batchwright.models.causal_lm import require
from batchwright.models.functional import GATED_ACTIVATIONS, soft_cap
from batchwright.models.layers import Embedding, RMSNorm
from batchwright.models.llama import MLP, Decoder, Llama


class Layer(nn.Module):
    """A transformer layer whose blocks are normalised on both sides."""

    def __init__(self, config: Mapping[str, Any], attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        hidden_size, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = RMSNorm(hidden_size, eps, unit_offset=True)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden_size, eps, unit_offset=True)
        self.pre_feedforward_layernorm = RMSNorm(hidden_size, eps, unit_offset=True)
        self.mlp = mlp
        self.post_feedforward_layernorm = RMSNorm(hidden_size, eps, unit_offset=True)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(x), attend)
        x = x + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed)


class Gemma2(Llama):
    """Norms multiply by 1 + weight; embeddings are scaled by sqrt(hidden_size)."""

    defaults = {
        **Llama.defaults,
        "tie_word_embeddings": True,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window_pattern": 2,
        "max_position_embeddings": 8192,
    }

    def __init__(self, config: Mapping[str, Any], max_positions: int) -> None:
        require(config, "use_bidirectional_attention", (None, False))
        super().__init__(config, max_positions)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits, cap = super().logits(hidden), self.config["final_logit_softcapping"]
        return logits if cap is None else soft_cap(logits, cap)

    def window(self, layer: int) -> int | None:
        """Every `sliding_window_pattern`-th layer sees everything, unless `layer_types` says."""
        layer_types = self.config.get("layer_types")
        if layer_types is None:
            is_windowed = (layer + 1) % self.config["sliding_window_pattern"] != 0
        else:
            is_windowed = layer_types[layer] == "sliding_attention"
        return self.config["sliding_window"] if is_windowed else None

    def spec(self, layer: int, rotary: RotaryTable | None) -> AttentionSpec:
        return replace(
            super().spec(layer, rotary),
            scale=self.config["query_pre_attn_scalar"] ** -0.5,
            soft_cap=self.config["attn_logit_softcapping"],
        )

    def mlp(self, layer: int) -> nn.Module:
        config = self.config
        return MLP(
            config["hidden_size"],
            config["intermediate_size"],
            activation=require(config, "hidden_activation", GATED_ACTIVATIONS),
        )

    def layer(self, spec: AttentionSpec) -> nn.Module:
        return Layer(self.config, self.attention(spec), self.mlp(spec.layer))

    def decoder(self, layers: list[nn.Module]) -> Decoder:
        config = self.config
        hidden_size = config["hidden_size"]
        embedding = Embedding(
            config["vocab_size"], hidden_size, scale=hidden_size**0.5, parallel=True
        )
        norm = RMSNorm(hidden_size, config["rms_norm_eps"], unit_offset=True)
        return Decoder(embedding, layers, norm)


Model = Gemma2
