"""Rates of products at a model's shapes, by rows: what the bounds charge.

Of each shape our own product and both ways of writing torch's are tried, and the fastest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from batchwright.bench.bounds import Rates
from batchwright.exec.product_rates import (
    CEILING_S_PER_POINT,
    cold_weights,
    distinct,
    engine_products,
    product_rates,
)
from batchwright.plan.cost import RateCurve
from batchwright.plan.shape import ModelShape, Product

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)

Multiply = Callable[[torch.Tensor], torch.Tensor]


def measure_rates(
    shape: ModelShape, dtype: torch.dtype, seconds_per_point: float = CEILING_S_PER_POINT
) -> Rates:
    """Measure with the threads that torch and our kernels have; some 15 s for a small model."""
    layers = [_curve(product, dtype, seconds_per_point) for product in distinct(shape.products)]
    return Rates(_highest(layers), _curve(shape.head, dtype, seconds_per_point))


def _curve(product: Product, dtype: torch.dtype, seconds_per_point: float) -> RateCurve:
    weights = cold_weights(product, dtype)
    kinds: list[list[Multiply]] = [
        [partial(F.linear, weight=weight) for weight in weights],
        [partial(_weights_first, weight) for weight in weights],
        list(engine_products(product, dtype)),
    ]
    return _highest(
        [product_rates(product, kind, ROWS, dtype, seconds_per_point) for kind in kinds]
    )


def _weights_first(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.mm(weight, x.t())


def _highest(curves: Sequence[RateCurve]) -> RateCurve:
    """The best of several curves at each of their common points."""
    columns = zip(*(curve.flops_per_s for curve in curves), strict=True)
    return RateCurve(curves[0].rows, tuple(map(max, columns)))
