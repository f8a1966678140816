"""Mixtral (arXiv:2401.04088): Mistral with a sparse mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from batchwright.models.causal_lm import require
from batchwright.models.mistral import Mistral
from batchwright.models.moe import SparseMoE, fetch_expert

_MIXTRAL_NAMES = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".down_proj.": ".w2.",
    ".up_proj.": ".w3.",
}


class Mixtral(Mistral):
    """The chosen experts' probabilities are scaled to sum to one."""

    defaults = {**Mistral.defaults, "rope_theta": 1_000_000.0}

    def mlp(self, layer: int) -> nn.Module:
        config = self.config
        require(config, "hidden_act", ("silu",))
        return SparseMoE(
            config["hidden_size"],
            config["intermediate_size"],
            config["num_local_experts"],
            config["num_experts_per_tok"],
            renormalise=True,
        )

    @classmethod
    def fetch(cls, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """Files on the hub use Mixtral's own names for the experts."""
        own = name
        for ours, theirs in _MIXTRAL_NAMES.items():
            own = own.replace(ours, theirs)
        return tensors[own] if own in tensors else fetch_expert(tensors, name)


Model = Mixtral
