"""How many FLOPs a model takes, counted from its modules: no architecture is described twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from batchwright.models.causal_lm import CausalLM
from batchwright.models.layers import Linear
from batchwright.models.moe import SparseMoE
from batchwright.plan.flops import ModelFlops

HEAD = "lm_head"


def model_flops(model: CausalLM, group_of_layer: Sequence[int]) -> ModelFlops:
    """Count a model's FLOPs.

    Args:
        group_of_layer: KV group of each layer that owns KV.
    """
    head = model.get_submodule(HEAD)
    assert isinstance(head, Linear)
    key = [0] * (max(group_of_layer) + 1)
    for spec, group in zip(model.attention_specs, group_of_layer, strict=True):
        key[group] += 4 * spec.num_q_heads * spec.head_dim
    body = [
        (child, share)
        for name, module in model.named_children()
        if name != HEAD
        for child, share in _products(module, 1.0)
    ]
    return ModelFlops(
        token=round(sum(2 * linear.weight.numel() * share for linear, share in body)),
        key=tuple(key),
        logits=2 * head.weight.numel(),
        layer_products=tuple(sorted({_widths(linear) for linear, _ in body})),
        logits_product=_widths(head),
    )


def _products(module: nn.Module, share: float) -> Iterator[tuple[Linear, float]]:
    """Every Linear below a module, with the share of tokens that pass through it."""
    if isinstance(module, Linear):
        yield module, share
        return
    for name, child in module.named_children():
        is_expert = isinstance(module, SparseMoE) and name == "experts"
        used = module.top_k / len(module.experts) if is_expert else 1.0  # type: ignore[arg-type, operator]
        yield from _products(child, share * used)


def _widths(linear: Linear) -> tuple[int, int]:
    outputs, inputs = linear.weight.shape
    return inputs, outputs
