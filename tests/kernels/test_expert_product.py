"""The readable twin of the expert kernels is what models/moe.py computes."""

from __future__ import annotations

import pytest
import torch

from batchwright.kernels.expert_product import naive
from batchwright.models.moe import SparseMoE, route

pytestmark = pytest.mark.cpu


def test_the_twin_is_the_model_s_block() -> None:
    torch.manual_seed(0)
    block = SparseMoE(24, 20, 5, 2, renormalise=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
        x = torch.randn(7, 24)
        weights, experts = route(block.gate(x), 2, renormalise=True)
        found = naive.expert_mlp(
            x,
            experts,
            weights,
            torch.stack([e.gate_up_proj.weight for e in block.experts]),
            torch.stack([e.down_proj.weight for e in block.experts]),
        )
        torch.testing.assert_close(found, block(x), rtol=1e-5, atol=1e-3)
