"""Rates of products at a model's shapes, by rows: what the bounds charge.

Of each shape our own product, with weights as narrow as they are stored, and both ways of writing
torch's are tried, and the fastest counts.
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
from batchwright.weights.forms import FP32, StoredForms

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)

Multiply = Callable[[torch.Tensor], torch.Tensor]


def measure_rates(
    shape: ModelShape,
    dtype: torch.dtype,
    seconds_per_point: float = CEILING_S_PER_POINT,
    *,
    forms: StoredForms = FP32,
    quantize: str | None = None,
) -> Rates:
    """Measure with the threads that torch and our kernels have; some 15 s for a small model.

    Args:
        forms: how fp32 weights are stored.
        quantize: as in EngineConfig: its products are tried too.
    """

    def curve(product: Product, form: str, quantize: str | None) -> RateCurve:
        kinds = _kinds(product, dtype, form, quantize)
        return _highest(
            [product_rates(product, kind, ROWS, dtype, seconds_per_point) for kind in kinds]
        )

    products = distinct(shape.products)
    exact = _highest([curve(product, forms.layers, None) for product in products])
    layers = exact
    if quantize:
        layers = _highest([curve(product, forms.layers, quantize) for product in products])
    return Rates(layers, curve(shape.head, forms.head, quantize), attention=exact)


def _kinds(
    product: Product, dtype: torch.dtype, form: str, quantize: str | None
) -> list[Sequence[Multiply]]:
    """Ways of computing a product, each with many weights."""
    weights = cold_weights(product, dtype)
    kinds: list[Sequence[Multiply]] = [
        [partial(F.linear, weight=weight) for weight in weights],
        [partial(_weights_first, weight) for weight in weights],
        engine_products(product, dtype),
    ]
    if form != "fp32":
        kinds.append(engine_products(product, dtype, form=form))
    if quantize:
        kinds.append(engine_products(product, dtype, quantize))
    return kinds


def _weights_first(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.mm(weight, x.t())


def _highest(curves: Sequence[RateCurve]) -> RateCurve:
    """The best of several curves at each of their common points."""
    columns = zip(*(curve.flops_per_s for curve in curves), strict=True)
    return RateCurve(curves[0].rows, tuple(map(max, columns)))
