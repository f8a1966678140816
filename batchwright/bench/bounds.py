"""Bounds: the least seconds that a job's necessary work takes at measured rates of products.

The *plain* bound charges every product at the best rate, which takes hundreds of rows. A job that
generates has steps with fewer: it needs at least as many steps as its longest output has tokens,
and if its work is spread evenly over just these, they have

    rows in the layers = computed tokens / longest output
    rows at the head = generated tokens / longest output

which no order of rows can raise in all steps. The *rows-aware* bound charges products at the best
rate for so many rows. Both charge attention at the layers' rate for unquantised weights, since
keys and values are not, and memory traffic and everything else at nothing, so neither is reached.
"""

from __future__ import annotations

from typing import NamedTuple

from batchwright.bench.necessary_work import NecessaryWork
from batchwright.plan.cost import RateCurve


class Rates(NamedTuple):
    """FLOP/s of a model's products by rows: the best shape and kind of product at each point.

    Attributes:
        attention: the layers' with weights that are not quantised.
    """

    layers: RateCurve
    head: RateCurve
    attention: RateCurve

    def best(self, other: Rates) -> Rates:
        """The better of two measurements at the same rows, point by point."""
        return Rates(*map(_best, self, other))


class Bounds(NamedTuple):
    """Seconds, and the rows of an evenly filled step."""

    plain_s: float
    rows_aware_s: float
    layer_rows: float
    head_rows: float


def bounds(work: NecessaryWork, rates: Rates) -> Bounds:
    """Both bounds of a job."""
    layer_rows = work.num_computed_tokens / work.longest_output
    head_rows = work.num_generated_tokens / work.longest_output
    return Bounds(
        plain_s=work.bound_s(rates.layers.best, rates.head.best, rates.attention.best),
        rows_aware_s=work.bound_s(
            best_rate(rates.layers, layer_rows),
            best_rate(rates.head, head_rows),
            best_rate(rates.attention, layer_rows),
        ),
        layer_rows=layer_rows,
        head_rows=head_rows,
    )


def best_rate(curve: RateCurve, num_rows: float) -> float:
    """The best FLOP/s of products with so many rows or fewer, since a step can be divided."""
    measured = zip(curve.rows, curve.flops_per_s, strict=True)
    fewer = [rate for rows, rate in measured if rows <= num_rows]
    return max([num_rows / curve.seconds(num_rows, 1.0), *fewer])


def _best(a: RateCurve, b: RateCurve) -> RateCurve:
    pairs = zip(a.flops_per_s, b.flops_per_s, strict=True)
    return RateCurve(a.rows, tuple(max(pair) for pair in pairs))
