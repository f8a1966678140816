"""SmolLM3: Llama in which some layers, by default every fourth, have no rotary positions (NoPE,
arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Sequence

from batchwright.attention.spec import RotaryTable
from batchwright.models.llama import Llama


class SmolLM3(Llama):
    """`no_rope_layers[i]` is 1 where layer i does rotate, despite the name."""

    defaults = {
        **Llama.defaults,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
    }

    def rotary(self, max_positions: int) -> Sequence[RotaryTable | None]:
        tables = super().rotary(max_positions)
        return [table if self.rotates(layer) else None for layer, table in enumerate(tables)]

    def rotates(self, layer: int) -> bool:
        """Whether a layer has rotary positions."""
        listed = self.config.get("no_rope_layers")
        if listed is None:
            return (layer + 1) % self.config["no_rope_layer_interval"] != 0
        return bool(listed[layer])

    def window(self, layer: int) -> int | None:
        config = self.config
        if not config.get("use_sliding_window"):
            return None
        layer_types = config.get("layer_types")
        if layer_types is None:
            is_windowed = not self.rotates(layer)
        else:
            is_windowed = layer_types[layer] == "sliding_attention"
        return config["sliding_window"] if is_windowed else None


Model = SmolLM3
