"""Batched service: the bounds against simulated queues, their limits, Little's law."""

from __future__ import annotations

import math

import numpy as np
import pytest

from batchwright.plan.advise.batch_queue import (
    BatchService,
    LinearBatch,
    dynamic_batch,
    elastic_batch,
    fixed_batch_sojourn,
    mean_sojourn_bound,
    sojourn_bounds,
)
from batchwright.plan.advise.single_queue import length_tail

SERVICE = BatchService(prompt_s=0.05, prefill_s=0.1, row_token_s=0.002, step_s=0.03)
MAX_TOKENS = 100
REQUESTS = 20_000


def batch_s(lengths: np.ndarray, elastic: bool) -> np.ndarray:
    """[batch] seconds from the start of a batch until each of its requests is answered."""
    size = len(lengths)
    prefill_s = SERVICE.prompt_s * size + SERVICE.prefill_s
    if not elastic:
        step_s = SERVICE.row_token_s * size + SERVICE.step_s
        return np.full(size, prefill_s + step_s * lengths.max())
    order = np.argsort(lengths, kind="stable")
    ranked = lengths[order]
    rows = size - np.arange(size)  # decoding while the i-th shortest is still there
    steps = np.diff(ranked, prepend=0)
    done_s = prefill_s + np.cumsum(steps * (SERVICE.row_token_s * rows + SERVICE.step_s))
    answered = np.empty(size)
    answered[order] = done_s
    return answered


def simulate(
    rate: float, seed: int, *, elastic: bool = False, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(arrival, answer) of each request; batches of all that wait, or always of `size`."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / rate, REQUESTS))
    lengths = random.integers(1, MAX_TOKENS + 1, REQUESTS)
    answers = np.empty(REQUESTS)
    first, now_s = 0, 0.0
    while first < REQUESTS:
        if size is None:
            now_s = max(now_s, arrivals[first])
            last = max(int(np.searchsorted(arrivals, now_s, side="right")), first + 1)
        else:
            last = min(first + size, REQUESTS)
            now_s = max(now_s, arrivals[last - 1])
        took_s = batch_s(lengths[first:last], elastic)
        answers[first:last] = now_s + took_s
        now_s += took_s.max()
        first = last
    return arrivals, answers


RATES = [0.1, 1.0, 3.0]


@pytest.mark.parametrize("rate", RATES)
def test_dynamic_batching_keeps_to_the_bounds(rate: float) -> None:
    arrivals, answers = simulate(rate, 1)
    bounds = sojourn_bounds(dynamic_batch(SERVICE, MAX_TOKENS), rate)
    assert (answers - arrivals).mean() <= min(bounds)


@pytest.mark.parametrize("rate", RATES)
def test_elastic_batching_is_never_worse(rate: float) -> None:
    """On the same arrivals and lengths; and it keeps to its own, lower, bounds."""
    means = []
    for elastic in (False, True):
        arrivals, answers = simulate(rate, 2, elastic=elastic)
        means.append((answers - arrivals).mean())
    assert means[1] < means[0]
    bound = elastic_batch(SERVICE, MAX_TOKENS, (MAX_TOKENS + 1) / 2)
    assert means[1] <= mean_sojourn_bound(bound, rate)
    assert mean_sojourn_bound(bound, rate) <= mean_sojourn_bound(
        dynamic_batch(SERVICE, MAX_TOKENS), rate
    )


@pytest.mark.parametrize("elastic", [False, True])
def test_littles_law(elastic: bool) -> None:
    """The area under the number of requests in the system is the sum of their times in it."""
    arrivals, answers = simulate(1.0, 3, elastic=elastic)
    times = np.concatenate((arrivals, answers))
    order = np.argsort(times, kind="stable")
    present = np.cumsum(np.repeat((1, -1), REQUESTS)[order])
    area = (present[:-1] * np.diff(times[order])).sum()
    assert present.min() >= 0 and present[-1] == 0  # a finished cycle
    assert area == pytest.approx((answers - arrivals).sum(), rel=1e-12)


@pytest.mark.parametrize("size, rate", [(2, 0.3), (8, 1.0), (16, 2.0)])
def test_fixed_batches(size: int, rate: float) -> None:
    """An approximation: within 10 % of simulated queues."""
    tail = length_tail(np.arange(1, MAX_TOKENS + 1))
    means = []
    for seed in range(4):
        arrivals, answers = simulate(rate, seed, size=size)
        means.append((answers - arrivals).mean())
    assert fixed_batch_sojourn(SERVICE, tail, rate, size) == pytest.approx(np.mean(means), rel=0.1)


def test_fixed_batches_have_an_optimum() -> None:
    tail = length_tail(np.arange(1, MAX_TOKENS + 1))
    times = [fixed_batch_sojourn(SERVICE, tail, 1.0, size) for size in range(1, 65)]
    best = int(np.argmin(times))
    assert times[0] == math.inf  # one at a time cannot keep up
    assert 1 < best < 63


@pytest.mark.parametrize("batch", [LinearBatch(0.3, 2.0), LinearBatch(2.0, 0.0)])
def test_limits_of_the_bounds(batch: LinearBatch) -> None:
    alone_s = batch.slope_s + batch.fixed_s
    phi0, phi1 = sojourn_bounds(batch, 1e-9)
    assert phi0 == pytest.approx(alone_s)
    assert phi0 <= phi1
    at_most = sojourn_bounds(batch, 0.999 / alone_s)
    assert at_most[0] <= at_most[1] * (1 + 1e-9)
    assert sojourn_bounds(batch, 1 / batch.slope_s) == (math.inf, math.inf)
