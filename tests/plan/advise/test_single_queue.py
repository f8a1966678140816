"""M/G/1 with clipped outputs: the golden table, a simulation, the choice of a limit."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from batchwright.errors import ConfigError
from batchwright.plan.advise.single_queue import (
    Service,
    choose_limit,
    clipped_queue,
    length_tail,
)

RATE, SERVICE = 1 / 40, Service(token_s=0.0225)


def lognormal_tail() -> np.ndarray:
    """LogNormal(7, 0.7), the paper's output lengths."""
    normal = NormalDist(7, 0.7)
    return np.array([1.0, *(1 - normal.cdf(math.log(k)) for k in range(1, 40_000))])


TAIL = lognormal_tail()


@pytest.mark.parametrize(
    "max_tokens, utilisation, wait_s, clipped",
    [(800, 0.4018, 5.65, 0.674), (1600, 0.6093, 22.34, 0.295), (3000, 0.7338, 55.37, 0.075)],
)
def test_golden_table(max_tokens, utilisation, wait_s, clipped) -> None:
    queue = clipped_queue(TAIL, RATE, SERVICE, max_tokens)
    assert queue.utilisation == pytest.approx(utilisation, abs=5e-5)
    assert queue.wait_s == pytest.approx(wait_s, abs=6e-3)
    assert queue.clipped_fraction == pytest.approx(clipped, abs=5e-4)


@pytest.mark.parametrize("max_tokens", [800, 1600, 3000])
def test_a_simulated_queue_waits_as_long(max_tokens: int) -> None:
    """Lindley's recursion, 64 runs of 20,000 requests: within 4 standard errors."""
    random = np.random.default_rng(max_tokens)
    runs, requests = 64, 20_000
    tokens = np.ceil(random.lognormal(7, 0.7, (requests, runs))).clip(max=max_tokens)
    gaps = random.exponential(1 / RATE, (requests, runs))
    wait = np.zeros(runs)
    total = np.zeros(runs)
    for service_s, gap_s in zip(SERVICE.token_s * tokens, gaps):
        total += wait
        wait = np.maximum(wait + service_s - gap_s, 0)
    means = total / requests
    error = means.std(ddof=1) / math.sqrt(runs)
    expected = clipped_queue(TAIL, RATE, SERVICE, max_tokens).wait_s
    assert abs(means.mean() - expected) < 4 * error
    assert error < 0.02 * expected  # else the line above would say nothing


def test_lengths_of_a_sample() -> None:
    """1, 1, 3, 5 tokens; clipped at 4 they are 1, 1, 3, 4."""
    tail = length_tail(np.array([1, 1, 3, 5]))
    queue = clipped_queue(tail, 0.1, Service(1.0, 0.5), 4)
    assert queue.mean_tokens == pytest.approx(9 / 4)
    assert queue.clipped_fraction == pytest.approx(1 / 4)
    service_s = np.array([1.5, 1.5, 3.5, 4.5])
    wait_s = 0.1 * (service_s**2).mean() / (2 * (1 - 0.1 * service_s.mean()))
    assert queue.wait_s == pytest.approx(wait_s)
    assert clipped_queue(tail, 0.1, Service(1.0), 100).clipped_fraction == 0


def test_the_limit_pays_for_its_wait() -> None:
    """At 12 tokens a second the paper's optimum of 1,600 comes out, within 1 %."""
    limits = range(200, 5000, 10)
    chosen = choose_limit(TAIL, RATE, SERVICE, limits, tokens_per_s_waited=12)
    assert chosen.max_tokens == pytest.approx(1600, rel=0.01)
    worth = [
        q.mean_tokens - 12 * q.wait_s
        for q in (clipped_queue(TAIL, RATE, SERVICE, limit) for limit in limits)
        if q.utilisation < 1
    ]
    assert chosen.mean_tokens - 12 * chosen.wait_s == max(worth)
    patient = choose_limit(TAIL, RATE, SERVICE, limits, tokens_per_s_waited=1)
    assert patient.max_tokens > chosen.max_tokens


def test_more_requests_than_can_be_served() -> None:
    assert clipped_queue(TAIL, 1.0, SERVICE, 800).wait_s == math.inf
    with pytest.raises(ConfigError, match=r"1 requests per second .* even with 400 tokens"):
        choose_limit(TAIL, 1.0, SERVICE, [800, 400], tokens_per_s_waited=12)
