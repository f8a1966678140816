"""Gemma 3's multimodal checkpoints, of which only the language model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from batchwright.models.gemma3_text import Gemma3Text


class Gemma3(Gemma3Text):
    """The settings are in `text_config`, the weights one level deeper."""

    not_weights = r".*(vision_tower|multi_modal_projector)\..*"

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, **super().read_config(config["text_config"])}

    @classmethod
    def fetch(cls, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """Older files have `language_model.model.x`, newer ones `model.language_model.x`."""
        inner = name.removeprefix("model.")
        candidates = (f"language_model.{name}", f"model.language_model.{inner}")
        found = [candidate for candidate in candidates if candidate in tensors]
        return tensors[found[0] if found else name]


Model = Gemma3
