"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on q, k and v."""

from __future__ import annotations

from torch import nn

from batchwright.attention.spec import AttentionSpec
from batchwright.models.llama import Attention, Llama


class Qwen2(Llama):
    """No windows unless `use_sliding_window`; then in the layers of `layer_types`, or the last."""

    def window(self, layer: int) -> int | None:
        config = self.config
        if not config.get("use_sliding_window"):
            return None
        layer_types = config.get("layer_types")
        if layer_types is None:
            is_windowed = layer >= config["max_window_layers"]
        else:
            is_windowed = layer_types[layer] == "sliding_attention"
        return config["sliding_window"] if is_windowed else None

    def attention(self, spec: AttentionSpec) -> nn.Module:
        return Attention(self.config["hidden_size"], spec, qkv_bias=True)


Model = Qwen2
