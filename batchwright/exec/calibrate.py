"""How fast this machine runs a model, measured in about two seconds without its weights.

Products are timed with weights made for it; attention, norms, activations and draws in steps of a
hollow model (`hollow.py`) on the executor itself; scheduling in an engine whose model is simulated.
The result is kept in the user's cache directory, by machine, threads, shape and number format.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchwright.exec.hollow_steps import measure_rest
from batchwright.exec.product_rates import (
    Clock,
    cold_weights,
    distinct,
    product_rates,
    quick_time_s,
)
from batchwright.models.layers import Linear
from batchwright.models.row_invariance import REMEDIES, find_remedy
from batchwright.plan.cost import Hardware, ModelShape, Product, RateCurve
from batchwright.processor import processor
from batchwright.user_cache import user_cache_directory

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raise it when the same machine and model must be measured again."""

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
    fresh: bool = False,
) -> Hardware:
    """This machine's rates for a model, from the cache if they are there.

    Args:
        config: the model's config.json.
        attention: name of the attention backend.
        num_threads: set for torch and the kernels beforehand.
        fresh: measure again, whatever is in the cache.
    """
    path = _cache_file(shape, dtype, attention, num_threads)
    if not fresh and path is not None and (known := _read(path)) is not None:
        return known
    start_s = time.perf_counter()
    hardware = measure(config, shape, dtype=dtype, attention=attention, num_threads=num_threads)
    logger.info(
        "measured this machine for the model's shapes in %.1f s", time.perf_counter() - start_s
    )
    if path is not None:
        _write(path, hardware)
    return hardware


def measure(
    config: Mapping[str, Any],
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    attention: str,
    num_threads: int,
    now: Clock = time.perf_counter,
) -> Hardware:
    """The same, always measured.

    Args:
        now: the clock; with one thread, `time.process_time` leaves out what others take.
    """
    layers, best = _layer_rates(shape, dtype, now)
    head = product_rates(
        shape.head, _linears(shape.head, dtype), HEAD_ROWS, dtype, S_PER_POINT, LONGEST_CALL_S, now
    )
    rest = measure_rest(config, shape, dtype=dtype, attention=attention, now=now)
    return Hardware(
        name=processor(),
        num_threads=num_threads,
        layers=layers,
        head=head,
        ceiling_flops_per_s=best,
        memory_bytes_per_s=_bandwidth(now),
        **rest._asdict(),
    )


def _layer_rates(shape: ModelShape, dtype: torch.dtype, now: Clock) -> tuple[RateCurve, float]:
    """(the curve of all products of the layers together, the best single rate)."""
    curves: list[tuple[float, RateCurve]] = []
    for product in distinct(shape.products):
        flops = sum(p.flops_per_token for p in shape.products if _same_shape(p, product))
        multiply = _linears(product, dtype)
        curve = product_rates(
            product, multiply, LAYER_ROWS, dtype, S_PER_POINT, LONGEST_CALL_S, now
        )
        curves.append((flops, curve))
    rows = max((curve.rows for _, curve in curves), key=len)
    total = sum(flops for flops, _ in curves)
    rates = [
        total * num_rows / sum(curve.seconds(num_rows, flops) for flops, curve in curves)
        for num_rows in rows
    ]
    return RateCurve(rows, tuple(rates)), max(curve.best for _, curve in curves)


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


def _bandwidth(now: Clock) -> float:
    """Bytes/s of reading memory from beginning to end."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4)
    return BANDWIDTH_BYTES / quick_time_s(lambda _: numbers.sum(), S_PER_POINT, now)


def _cache_file(
    shape: ModelShape, dtype: torch.dtype, attention: str, num_threads: int
) -> Path | None:
    directory = user_cache_directory("calibration")
    if directory is None:
        return None
    what = (
        FORMAT_VERSION,
        *(processor(), len(os.sched_getaffinity(0)), num_threads, torch.__version__),
        *(str(dtype), attention, repr(shape)),
    )
    name = hashlib.blake2b(repr(what).encode(), digest_size=12).hexdigest()
    return directory / f"{name}.json"


def _read(path: Path) -> Hardware | None:
    """What an earlier run has measured; None if there is nothing or it is damaged."""
    try:
        values = json.loads(path.read_bytes())
        for name in ("layers", "head"):
            curve = values[name]
            values[name] = RateCurve(tuple(curve["rows"]), tuple(curve["flops_per_s"]))
        return Hardware(**values)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, hardware: Hardware) -> None:
    """Keep a measurement; not being able to costs the next plan two seconds."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(asdict(hardware), file)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("the measurement is not kept in %s: %s", path.parent, error)
