"""A model's ModelShape, counted from its modules: no architecture is described twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from batchwright.kv.groups import windows_of_layers
from batchwright.models.causal_lm import CausalLM
from batchwright.models.layers import INT8_NDIM, Embedding, Linear
from batchwright.models.loader import build_empty
from batchwright.models.moe import SparseMoE
from batchwright.plan.shape import AttentionShape, ModelShape, Product

HEAD = "lm_head"


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that a config.json describes; no weights are read or made.

    Raises:
        UnsupportedModelError: unknown architecture or setting.
        ModelFormatError: an entry is missing or no size.
    """
    return shape_of(build_empty(config, max_positions=1))


def shape_of(model: CausalLM) -> ModelShape:
    """Count a model, which may be on the meta device."""
    head = model.get_submodule(HEAD)
    assert isinstance(head, Linear)
    counts: Counter[tuple[int, int, float]] = Counter()
    for name, module in model.named_children():
        if name != HEAD:
            counts.update((*_widths(linear), share) for linear, share in _products(module, 1.0))
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    sizes |= {
        id(table.weight): table.num_embeddings * table.hidden_size
        for table in model.modules()
        if isinstance(table, Embedding)
    }
    sizes |= {id(linear.weight): math.prod(_widths(linear)) for linear, _ in _products(model, 1.0)}
    num_params = sum(sizes.values())  # each object once, whatever its packed layout
    if model.config["tie_word_embeddings"] and (
        head.weight.is_meta or head.weight.ndim == INT8_NDIM
    ):  # not tied yet, or an int8 copy
        num_params -= math.prod(_widths(head))
    return ModelShape(
        hidden_size=model.config["hidden_size"],
        vocab_size=model.config["vocab_size"],
        num_layers=model.config["num_hidden_layers"],
        products=tuple(
            Product(inputs, outputs, num_weights, share)
            for (inputs, outputs, share), num_weights in counts.items()
        ),
        head=Product(*_widths(head)),
        attention=_attention(model),
        num_params=num_params,
    )


def _attention(model: CausalLM) -> tuple[AttentionShape, ...]:
    specs = model.attention_specs
    windows, group_of_layer = windows_of_layers([spec.window for spec in specs])
    shapes = []
    for group, window in enumerate(windows):
        mine = [spec for spec, own in zip(specs, group_of_layer, strict=True) if own == group]
        heads = {(spec.num_q_heads, spec.num_kv_heads, spec.head_dim) for spec in mine}
        assert len(heads) == 1, "layers of one KV group have the same heads"
        shapes.append(AttentionShape(window, len(mine), *heads.pop()))
    return tuple(shapes)


def _products(module: nn.Module, share: float) -> Iterator[tuple[Linear, float]]:
    """Every Linear in a module, with the share of tokens that pass through it."""
    if isinstance(module, Linear):
        yield module, share
        return
    for name, child in module.named_children():
        if isinstance(module, SparseMoE) and name == "experts":
            yield from _products(child, share * module.top_k / len(module.experts))
        else:
            yield from _products(child, share)


def _widths(linear: Linear) -> tuple[int, int]:
    return linear.in_features, linear.out_features
