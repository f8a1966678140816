"""Rates of matrix products at a model's shapes, by rows.

The best of them, torch's or ours, is a ceiling: not the processor's peak, but what the engine
reaches when everything else costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from batchwright.kernels.int8_linear import packing as int8_packing
from batchwright.kernels.linear.packing import blank
from batchwright.models.layers import Linear
from batchwright.plan.cost import RateCurve
from batchwright.plan.shape import ModelShape, Product
from batchwright.weights.block_tensor import FORM_BYTES

CEILING_ROWS = (128, 256, 512)
CEILING_S_PER_POINT = 0.1
COLD_BYTES = 128 * 2**20
"""Products take turns at so many bytes of weights: these come from memory then, as a model's do."""

MIN_CALLS, MAX_CALLS = 3, 200
LONGEST_WAIT = 3
"""Times the seconds of a point, that it may take by the clock when others use the machine."""

Multiply = Callable[[torch.Tensor], torch.Tensor]
Timer = Callable[[Callable[[int], object], float], float]


class Ceiling(NamedTuple):
    """Best rates of products at a model's shapes, in FLOP/s."""

    layers: float
    head: float

    def best(self, other: Ceiling) -> Ceiling:
        """The better of two measurements, each for itself."""
        return Ceiling(max(self.layers, other.layers), max(self.head, other.head))


def measure_ceiling(
    shape: ModelShape,
    dtype: torch.dtype = torch.float32,
    seconds_per_point: float = CEILING_S_PER_POINT,
    quantize: str | None = None,
) -> Ceiling:
    """The best product, shape and number of rows, with the threads that torch and kernels have."""

    def best(product: Product) -> float:
        torchs = [partial(F.linear, weight=weight) for weight in cold_weights(product, dtype)]
        ways: list[Sequence[Multiply]] = [torchs, engine_products(product, dtype, quantize)]
        return max(
            product_rates(product, multiply, CEILING_ROWS, dtype, seconds_per_point).best
            for multiply in ways
        )

    return Ceiling(layers=max(map(best, distinct(shape.products))), head=best(shape.head))


def distinct(products: Sequence[Product]) -> list[Product]:
    """One product of every shape."""
    return list({(p.in_features, p.out_features): p for p in products}.values())


def engine_products(
    product: Product, dtype: torch.dtype, quantize: str | None = None, form: str = "fp32"
) -> list[Linear]:
    """Products of a shape as the engine makes them, whose weights come from memory.

    Args:
        form: how fp32 weights are stored, a key of FORM_BYTES.
    """
    itemsize = 1 if quantize else FORM_BYTES[form] if dtype == torch.float32 else dtype.itemsize
    return [
        timed_linear(product.in_features, product.out_features, dtype, quantize, form)
        for _ in range(_num_cold(product, itemsize))
    ]


def timed_linear(
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    quantize: str | None,
    form: str = "fp32",
) -> Linear:
    """A product as the engine makes it. What its weight holds changes no time."""
    with torch.device("meta"):
        linear = Linear(in_features, out_features)
    make_real(linear, dtype, quantize, form)
    return linear


def make_real(linear: Linear, dtype: torch.dtype, quantize: str | None, form: str = "fp32") -> None:
    """Give a Linear of the meta device a weight, and zeros as its bias."""
    if linear.bias is not None:
        bias = torch.zeros(linear.out_features, dtype=dtype)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    if quantize == "int8" and not linear.exact:
        linear.hold_int8(int8_packing.blank(linear.out_features, linear.in_features))
    elif dtype == torch.float32:
        linear.hold(blank(linear.out_features, linear.in_features, form))
    else:
        weight = torch.full((linear.out_features, linear.in_features), 0.01, dtype=dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)


def product_rates(
    product: Product,
    multiply: Sequence[Multiply],
    row_counts: Sequence[int],
    dtype: torch.dtype,
    seconds_per_point: float,
    longest_call_s: float = float("inf"),
    timer: Timer | None = None,
) -> RateCurve:
    """Rates of products of one shape.

    Args:
        multiply: the product with one weight each; they take turns.
        row_counts: ascending.
        seconds_per_point: spent on each; a product that takes longer is called MIN_CALLS times.
        longest_call_s: row counts whose products would take longer are left out.
        timer: `quick_time_s` or `usual_time_s`.
    """
    rows: list[int] = []
    rates: list[float] = []
    flops_per_row = 2 * product.in_features * product.out_features
    with torch.inference_mode():
        for num_rows in row_counts:
            if rates and num_rows * flops_per_row / rates[-1] > longest_call_s:
                break
            x = torch.rand(num_rows, product.in_features).to(dtype)
            call = partial(_take_turns, multiply, x)
            seconds = (timer or quick_time_s)(call, seconds_per_point)
            rows.append(num_rows)
            rates.append(num_rows * flops_per_row / seconds)
    return RateCurve(tuple(rows), tuple(rates))


def _take_turns(multiply: Sequence[Multiply], x: torch.Tensor, turn: int) -> torch.Tensor:
    return multiply[turn % len(multiply)](x)


def cold_weights(product: Product, dtype: torch.dtype) -> list[torch.Tensor]:
    """As many weights as the model has, or COLD_BYTES of them. What they hold changes no time."""
    shape = (product.out_features, product.in_features)
    count = _num_cold(product, dtype.itemsize)
    return [torch.full(shape, 0.01, dtype=dtype) for _ in range(count)]


def _num_cold(product: Product, itemsize: float) -> int:
    size = product.in_features * product.out_features * itemsize
    return max(1, min(product.num_weights, int(COLD_BYTES // size)))


def quick_time_s(call: Callable[[int], object], seconds: float) -> float:
    """What a call takes when nothing disturbs it: the first quartile, since noise only adds.

    Args:
        call: is given the number of the call.
        seconds: spent, about; one more call warms up.
    """
    times_s = _times_s(call, seconds)
    return sorted(times_s)[len(times_s) // 4]


def usual_time_s(call: Callable[[int], object], seconds: float) -> float:
    """What a call usually takes of this thread's own time, the median; as `quick_time_s`.

    The time of the thread, not of the clock: on a machine that others use, a long call is
    interrupted every time, and its time by the clock says more about the others. A thread that
    waits for its helpers spins, so with several threads it is about the time of all of them.
    """
    times_s = _times_s(call, seconds, time.thread_time)
    return sorted(times_s)[len(times_s) // 2]


def _times_s(
    call: Callable[[int], object],
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    call(0)
    times_s: list[float] = []
    end, last = now() + seconds, time.perf_counter() + LONGEST_WAIT * seconds
    while len(times_s) < MIN_CALLS or (
        now() < end and time.perf_counter() < last and len(times_s) < MAX_CALLS
    ):
        start = now()
        call(len(times_s) + 1)
        times_s.append(now() - start)
    return times_s
