"""Gemma 3, text only (arXiv:2503.19786): Gemma 2 with q and k norms, five windows to one full
layer, and a rotary base of its own for the windows; no soft caps unless asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from batchwright.attention.spec import AttentionSpec, RotaryTable
from batchwright.models.gemma2 import Gemma2
from batchwright.models.qwen3 import NormedAttention
from batchwright.models.rotary import rotary_parameters, rotary_table


class Gemma3Text(Gemma2):
    """Multimodal checkpoints leave most of their text_config to these defaults."""

    defaults = {
        **Gemma2.defaults,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    }

    def rotary(self, max_positions: int) -> Sequence[RotaryTable | None]:
        config, head_dim = self.config, self.head_dim()
        full = rotary_parameters(config, "full_attention")
        local = {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
        local |= (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        full_table = rotary_table(full, head_dim, max_positions)
        local_table = rotary_table(local, head_dim, max_positions)
        layers = range(config["num_hidden_layers"])
        return [full_table if self.window(layer) is None else local_table for layer in layers]

    def attention(self, spec: AttentionSpec) -> nn.Module:
        config = self.config
        return NormedAttention(
            config["hidden_size"],
            spec,
            config["rms_norm_eps"],
            bias=config["attention_bias"],
            unit_offset=True,
        )


Model = Gemma3Text
