"""Random mixture-of-experts problems for the GPU kernels, against their twin in fp64."""

from __future__ import annotations

import torch

from batchwright.kernels.expert_product import naive
from batchwright.kernels.expert_product.triton import (
    ProductTile,
    expert_mlp,
    expert_product,
    sort_by_expert,
    sum_ranks,
)
from batchwright.models.moe import route
from benchmarks.gpu.attention_case import largest_difference, relative_error

PRODUCT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative, per row: sums over a row's length in fp32, and one rounding of the result."""
MLP_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""The inner numbers are rounded twice, the outputs before and after their sum."""


def make_experts(
    num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, experts) of a router that favours some experts and never takes the last."""
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    logits += torch.linspace(2, 0, num_experts)
    if num_experts > top_k:
        logits[:, -1] = -torch.inf
    return route(logits, top_k, renormalise=True)


def expert_errors(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    *,
    tile: ProductTile | None = None,
) -> dict[str, tuple[float, float]]:
    """(error, tolerance) of the sort, both products, the sum and the whole block."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = random(num_tokens, hidden_size + 8).to(dtype)[:, :hidden_size]  # strided rows
    gate_up = (random(num_experts, 2 * width, hidden_size) / hidden_size**0.5).to(dtype)
    down = (random(num_experts, hidden_size, width) / width**0.5).to(dtype)
    weights, experts = make_experts(num_tokens, num_experts, top_k, generator)
    num_pairs = num_tokens * top_k
    inner = random(num_pairs, width).to(dtype)

    pairs, starts = naive.sort_by_expert(experts, num_experts)
    order = pairs.long()
    there = x.to(device, copy=True), experts.to(device), weights.to(device)
    gate_up_there, down_there = gate_up.to(device), down.to(device)
    rows = sort_by_expert(there[1], num_experts)
    same = torch.equal(rows.pairs.cpu(), pairs) and torch.equal(rows.starts.cpu(), starts)

    both = torch.full((num_pairs, 2 * width), torch.nan, dtype=dtype, device=device)
    expert_product(there[0], gate_up_there, rows, both, top_k=top_k, tile=tile)
    right_both = naive.expert_product(x.double()[order // top_k], gate_up.double(), starts)

    outputs = torch.full((num_pairs, hidden_size), torch.nan, dtype=dtype, device=device)
    expert_product(inner.to(device), down_there, rows, outputs, to_pairs=True, tile=tile)
    right_outputs = torch.empty(num_pairs, hidden_size, dtype=torch.float64)
    right_outputs[order] = naive.expert_product(inner.double(), down.double(), starts)

    per_token = outputs.unflatten(0, (num_tokens, top_k))
    out = torch.full((num_tokens, hidden_size), torch.nan, dtype=dtype, device=device)
    sum_ranks(per_token, there[2], out)
    right_out = naive.sum_ranks(per_token.cpu(), weights)

    block = expert_mlp(*there, gate_up_there, down_there)
    right_block = naive.expert_mlp(x.double(), experts, weights, gate_up.double(), down.double())
    return {
        "sorted": (0.0 if same else torch.inf, 0.0),
        "gate and up": (relative_error(both, right_both), PRODUCT_TOLERANCE[dtype]),
        "down": (relative_error(outputs, right_outputs), PRODUCT_TOLERANCE[dtype]),
        "sum": (largest_difference(out, right_out), 0.0),
        "block": (relative_error(block, right_block), MLP_TOLERANCE[dtype]),
    }
