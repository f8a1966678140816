"""The machine's matrix-product ceiling: what torch's own products reach at a model's shapes.

A bound from the best product, not the processor's peak: it is what an engine whose products are
torch's can reach when everything else costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.necessary_work import ModelShape

CEILING_ROWS = (128, 256, 512)
CEILING_S_PER_SHAPE = 0.3


class Ceiling(NamedTuple):
    """Best measured rates of fp32 products x W^T at the model's shapes, in FLOP/s."""

    layers: float
    head: float

    def best(self, other: Ceiling) -> Ceiling:
        """The better of two measurements, each for itself."""
        return Ceiling(max(self.layers, other.layers), max(self.head, other.head))


def measure_ceiling(shape: ModelShape) -> Ceiling:
    """Rates of `F.linear` in fp32 with the threads torch has now: the best shape and row count."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    layers = [(hidden, intermediate), (hidden, 2 * intermediate), (intermediate, hidden)]
    return Ceiling(
        layers=max(_product_rate(*widths) for widths in layers),
        head=_product_rate(hidden, shape.vocab_size),
    )


def _product_rate(in_features: int, out_features: int) -> float:
    """Best FLOP/s over CEILING_ROWS."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    best = 0.0
    with torch.inference_mode():
        for num_rows in CEILING_ROWS:
            x = torch.randn(num_rows, in_features, generator=generator)
            seconds = _quick_time_s(lambda x=x: torch.nn.functional.linear(x, weight))
            best = max(best, 2 * num_rows * in_features * out_features / seconds)
    return best


def _quick_time_s(call: Callable[[], object]) -> float:
    """First quartile of the times of as many calls as fit (at least five): noise only adds."""
    call()
    times_s: list[float] = []
    end = time.perf_counter() + CEILING_S_PER_SHAPE
    while len(times_s) < 5 or (time.perf_counter() < end and len(times_s) < 200):
        start = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start)
    return sorted(times_s)[len(times_s) // 4]
