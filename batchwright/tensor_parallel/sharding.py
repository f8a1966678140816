"""A model divided over ranks, and whether it can be.

Megatron-LM's division (arXiv:1909.08053): a rank has whole heads, a part of every MLP's inner width
(also of every expert's), and a part of the vocabulary in embeddings and output head. Norms, routers
and learned positions are on every rank. What each product does is said where it is made
(`models/layers.Parallel`).
"""

from __future__ import annotations

import dataclasses
import math

from torch import nn

from batchwright.attention.spec import AttentionSpec
from batchwright.errors import ConfigError
from batchwright.models.causal_lm import CausalLM
from batchwright.models.layers import Embedding, Linear, Parallel
from batchwright.models.moe import SparseMoE
from batchwright.tensor_parallel.ranks import Ranks


def check_divisible(model: CausalLM, size: int) -> None:
    """Refuse to divide heads or inner widths unevenly.

    Args:
        model: not divided, on the meta device or not.
        size: ranks.
    Raises:
        ConfigError: naming the sizes, and those that are possible.
    """
    heads = {spec.num_kv_heads for spec in model.attention_specs}
    widths = {
        linear.in_features
        for module in model.modules()
        if not _has_spec(module)
        for linear in module.children()
        if isinstance(linear, Linear) and linear.parallel in (Parallel.ROW, Parallel.SUMMAND)
    }
    if all(number % size == 0 for number in heads | widths):
        return
    common = math.gcd(*heads, *widths)
    possible = [str(n) for n in range(1, common + 1) if common % n == 0]
    raise ConfigError(
        f"tensor_parallel_size is {size}, which must divide the model's number of key-value heads "
        f"({_listed(heads)}) and the inner width of its MLPs ({_listed(widths)}); "
        f"use {' or '.join(possible)} (--tensor-parallel-size)"
    )


def divide(model: CausalLM, ranks: Ranks) -> None:
    """Make a model without weights this rank's part of it; see `check_divisible`."""
    specs = {
        spec.layer: dataclasses.replace(
            spec,
            num_q_heads=spec.num_q_heads // ranks.size,
            num_kv_heads=spec.num_kv_heads // ranks.size,
        )
        for spec in model.attention_specs
    }
    model.attention_specs = tuple(specs.values())
    for module in model.modules():
        if isinstance(module, Linear | Embedding | SparseMoE):
            module.divide(ranks)
        spec = getattr(module, "spec", None)
        if isinstance(spec, AttentionSpec):
            module.spec = specs[spec.layer]  # type: ignore[assignment]


def _has_spec(module: nn.Module) -> bool:
    return isinstance(getattr(module, "spec", None), AttentionSpec)


def _listed(numbers: set[int]) -> str:
    return ", ".join(f"{number:,}" for number in sorted(numbers))
