"""Readable twin of expert_product: torch."""

from __future__ import annotations

import itertools

import torch

from batchwright.kernels.gated_activation.naive import gated_activation


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs, starts): pairs (token * top_k + rank) by expert, stable, and where experts begin.

    Args:
        experts: [num_tokens, top_k] of [0, num_experts).
    Returns:
        [num_tokens * top_k] and [num_experts + 1], int32.
    """
    flat = experts.flatten().long()
    ends = flat.bincount(minlength=num_experts).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    return flat.argsort(stable=True).int(), starts.int()


def expert_product(x: torch.Tensor, weight: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Rows [starts[e], starts[e + 1]) of x times the transpose of weight[e], for every expert e."""
    out = x.new_empty(len(x), weight.shape[1])
    bounds = starts.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        out[start:end] = x[start:end] @ weight[expert].T
    return out


def sum_ranks(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over a token's experts, in the order of its ranks, as models/moe.py does.

    Args:
        outputs: [num_tokens, top_k, hidden_size].
        weights: [num_tokens, top_k] fp32.
    """
    total = outputs[:, 0].float() * weights[:, :1]
    for rank in range(1, weights.shape[1]):
        total += outputs[:, rank].float() * weights[:, rank, None]
    return total.to(outputs.dtype)


def expert_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    kind: str = "silu",
) -> torch.Tensor:
    """The experts of a sparse feed-forward block; arguments as in triton.py."""
    pairs, starts = sort_by_expert(experts, len(gate_up))
    order = pairs.long()
    inner = gated_activation(
        expert_product(x[order // experts.shape[1]], gate_up, starts), kind
    ).to(x.dtype)
    outputs = x.new_empty(len(order), x.shape[1])
    outputs[order] = expert_product(inner, down, starts)
    return sum_ranks(outputs.unflatten(0, experts.shape), weights)
