"""Qwen3 with a sparse mixture of experts in some or all layers (arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from batchwright.models.causal_lm import require
from batchwright.models.moe import SparseMoE, fetch_expert
from batchwright.models.qwen3 import Qwen3


class Qwen3MoE(Qwen3):
    """A layer is dense if listed in `mlp_only_layers` or off the beat of `decoder_sparse_step`."""

    defaults = {
        **Qwen3.defaults,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
    }

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        config = super().read_config(config)
        if "num_experts" not in config:  # newer files
            config["num_experts"] = config["num_local_experts"]
        return config

    def window(self, layer: int) -> int | None:
        """The same in every layer, unlike dense Qwen3."""
        return self.config["sliding_window"] if self.config.get("use_sliding_window") else None

    def mlp(self, layer: int) -> nn.Module:
        config = self.config
        is_beat = (layer + 1) % config["decoder_sparse_step"] == 0
        if not is_beat or layer in (config["mlp_only_layers"] or []):
            return super().mlp(layer)
        require(config, "hidden_act", ("silu",))
        return SparseMoE(
            config["hidden_size"],
            config["moe_intermediate_size"],
            config["num_experts"],
            config["num_experts_per_tok"],
            renormalise=config["norm_topk_prob"],
        )

    @classmethod
    def fetch(cls, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        return fetch_expert(tensors, name)


Model = Qwen3MoE
