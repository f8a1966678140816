"""How fast this machine runs a model, measured in about two seconds without its weights.

Products are timed with weights made for it; attention, norms, activations and draws in steps of a
hollow model (`hollow.py`) on the executor itself; scheduling in an engine whose model is simulated.
Usual times, not the best, and nothing is kept: a machine that is busy now may stay so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from batchwright.exec.hollow_steps import measure_rest
from batchwright.exec.product_rates import (
    cold_weights,
    distinct,
    product_rates,
    usual_time_s,
)
from batchwright.models.layers import Linear
from batchwright.models.row_invariance import REMEDIES, find_remedy
from batchwright.plan.cost import Hardware, ModelShape, Product, RateCurve
from batchwright.processor import processor

LAYER_ROWS = (12, 32, 64, 128, 256, 512)
HEAD_ROWS = (12, 32, 64, 256)
S_PER_POINT = 0.03
LONGEST_CALL_S = 0.15
BANDWIDTH_BYTES = 64 * 2**20


def calibrate(
    config: Mapping[str, Any],
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    attention: str,
    num_threads: int,
) -> Hardware:
    """This machine's rates for a model.

    Args:
        config: the model's config.json.
        attention: name of the attention backend.
        num_threads: set for torch and the kernels beforehand.
    """
    layers, best = _layer_rates(shape, dtype)
    head = product_rates(
        shape.head,
        _linears(shape.head, dtype),
        HEAD_ROWS,
        dtype,
        S_PER_POINT,
        LONGEST_CALL_S,
        usual_time_s,
    )
    rest = measure_rest(config, shape, dtype=dtype, attention=attention)
    return Hardware(
        name=processor(),
        num_threads=num_threads,
        layers=layers,
        head=head,
        ceiling_flops_per_s=best,
        memory_bytes_per_s=_bandwidth(),
        **rest._asdict(),
    )


def _layer_rates(shape: ModelShape, dtype: torch.dtype) -> tuple[RateCurve, float]:
    """(the curve of all products of the layers together, the best single rate)."""
    curves: list[tuple[float, RateCurve]] = []
    for product in distinct(shape.products):
        flops = sum(p.flops_per_token for p in shape.products if _same_shape(p, product))
        curve = _rates(product, LAYER_ROWS, dtype)
        curves.append((flops, curve))
    rows = max((curve.rows for _, curve in curves), key=len)
    total = sum(flops for flops, _ in curves)
    rates = [
        total * num_rows / sum(curve.seconds(num_rows, flops) for flops, curve in curves)
        for num_rows in rows
    ]
    return RateCurve(rows, tuple(rates)), max(curve.best for _, curve in curves)


def _rates(product: Product, row_counts: Sequence[int], dtype: torch.dtype) -> RateCurve:
    multiply = _linears(product, dtype)
    return product_rates(
        product, multiply, row_counts, dtype, S_PER_POINT, LONGEST_CALL_S, usual_time_s
    )


def _same_shape(a: Product, b: Product) -> bool:
    return (a.in_features, a.out_features) == (b.in_features, b.out_features)


def _linears(product: Product, dtype: torch.dtype) -> list[Linear]:
    """Products as the engine makes them: padded or tiled as this BLAS needs it."""
    linears = []
    for weight in cold_weights(product, dtype):
        with torch.device("meta"):
            linear = Linear(product.in_features, product.out_features)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linears.append(linear)
    if dtype == torch.float32:
        linears[0].weight.normal_(0, 0.05)  # rounding does not show in equal numbers
        remedy = find_remedy(linears[0], max(LAYER_ROWS)) or REMEDIES[0]
        for linear in linears:
            linear.min_rows, linear.tile_rows = remedy
    return linears


def _bandwidth() -> float:
    """Bytes/s of reading memory from beginning to end."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4)
    return BANDWIDTH_BYTES / usual_time_s(lambda _: numbers.sum(), S_PER_POINT)
