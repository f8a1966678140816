"""How fast this machine runs a model, measured in some three seconds without its weights.

Products are timed with weights made for it; then whole steps of a few of its layers on the executor
itself (`hollow_steps.py`), which correct the products' rates and tell what all the rest takes;
scheduling in an engine whose model is simulated. Usual times of the thread, not the best; how much
longer they took by the clock, because others use the machine, is told apart (`Hardware.busy`).
Nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from batchwright.exec.hollow_steps import measure_steps
from batchwright.exec.product_rates import (
    distinct,
    engine_products,
    product_rates,
    usual_time_s,
)
from batchwright.plan.cost import Hardware, RateCurve
from batchwright.plan.shape import ModelShape, Product
from batchwright.processor import processor
from batchwright.weights.forms import FP32, StoredForms

LAYER_ROWS = (1, 4, 16, 32, 64, 128, 256, 512)
HEAD_ROWS = (1, 4, 16, 64, 256)
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
    quantize: str | None = None,
    forms: StoredForms = FP32,
) -> Hardware:
    """This machine's rates for a model.

    Args:
        config: the model's config.json.
        attention: name of the attention backend.
        num_threads: set for torch and the kernels beforehand.
        quantize: as in EngineConfig.
        forms: how fp32 weights are stored.
    """
    layers, best = _layer_rates(shape, dtype, quantize, forms.layers)
    head = product_rates(
        shape.head,
        engine_products(shape.head, dtype, quantize, forms.head),
        HEAD_ROWS,
        dtype,
        S_PER_POINT,
        LONGEST_CALL_S,
        usual_time_s,
    )
    measured = measure_steps(
        config,
        shape,
        dtype=dtype,
        attention=attention,
        quantize=quantize,
        form=forms.layers,
    )
    is_dense = all(product.share == 1 for product in shape.products)
    return Hardware(
        name=processor(),
        num_threads=num_threads,
        layers=_corrected(layers, measured.products, shape) if is_dense else layers,
        head=head,
        ceiling_flops_per_s=best,
        memory_bytes_per_s=_bandwidth(),
        busy=measured.busy,
        **measured.rest._asdict(),
    )


def _corrected(
    curve: RateCurve, products: Sequence[tuple[int, float]], shape: ModelShape
) -> RateCurve:
    """The curve as products run in steps, between other kernels.

    Args:
        products: (rows, seconds of all products of the layers) as steps had them.
    """
    num_rows = [rows for rows, _ in products]
    flops = shape.layer_flops_per_token
    slower = [seconds / curve.seconds(rows, flops) for rows, seconds in products]
    rates = np.array(curve.flops_per_s) / np.interp(np.log(curve.rows), np.log(num_rows), slower)
    return RateCurve(curve.rows, tuple(rates.tolist()))


def _layer_rates(
    shape: ModelShape, dtype: torch.dtype, quantize: str | None, form: str
) -> tuple[RateCurve, float]:
    """(the curve of all products of the layers together, the best single rate)."""
    curves: list[tuple[float, RateCurve]] = []
    for product in distinct(shape.products):
        flops = sum(p.flops_per_token for p in shape.products if _same_shape(p, product))
        curve = _rates(product, dtype, quantize, form)
        curves.append((flops, curve))
    rows = max((curve.rows for _, curve in curves), key=len)
    total = sum(flops for flops, _ in curves)
    rates = [
        total * num_rows / sum(curve.seconds(num_rows, flops) for flops, curve in curves)
        for num_rows in rows
    ]
    return RateCurve(rows, tuple(rates)), max(curve.best for _, curve in curves)


def _rates(product: Product, dtype: torch.dtype, quantize: str | None, form: str) -> RateCurve:
    multiply = engine_products(product, dtype, quantize, form)
    return product_rates(
        product, multiply, LAYER_ROWS, dtype, S_PER_POINT, LONGEST_CALL_S, usual_time_s
    )


def _same_shape(a: Product, b: Product) -> bool:
    return (a.in_features, a.out_features) == (b.in_features, b.out_features)


def _bandwidth() -> float:
    """Bytes/s of reading memory from beginning to end."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4)
    return BANDWIDTH_BYTES / usual_time_s(lambda _: numbers.sum(), S_PER_POINT)
