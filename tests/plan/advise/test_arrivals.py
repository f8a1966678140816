"""Simulated arrivals against the queues they must equal or keep to."""

from __future__ import annotations

import numpy as np
import pytest

from batchwright.arrivals import poisson_arrivals, simulate_arrivals
from batchwright.exec.sim import LinearCost
from batchwright.kv.groups import KVGroup
from batchwright.plan.advise.batch_queue import (
    BatchService,
    dynamic_batch,
    elastic_batch,
    mean_sojourn_bound,
)
from batchwright.simulate import EngineSizes

COST = LinearCost(step_s=0.02, token_s=0.005, key_s=0.0)


def engine(max_num_seqs: int) -> EngineSizes:
    return EngineSizes(
        groups=[KVGroup(None, 10_000)],
        block_size=32,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=512,
        max_model_len=1024,
        prefix_sharing=False,
        horizon=4096,
    )


def run(rate: float, max_num_seqs: int, lengths: np.ndarray):
    arrivals = poisson_arrivals(len(lengths), rate, seed=7)
    prompts = [np.full(1, row, np.int32) for row in range(len(lengths))]
    served = simulate_arrivals(prompts, lengths.tolist(), arrivals, engine(max_num_seqs), COST)
    return arrivals, served


def test_one_at_a_time_is_lindleys_recursion() -> None:
    lengths = np.random.default_rng(1).integers(1, 40, 300)
    arrivals, served = run(1.2, 1, lengths)
    answer_s, expected = 0.0, []
    for arrival_s, length in zip(arrivals, lengths):
        answer_s = max(answer_s, arrival_s) + 0.025 * length
        expected.append(answer_s - arrival_s)
    assert served.sojourn_s == pytest.approx(expected, rel=1e-9)
    busy_s = 0.025 * lengths.sum()
    assert served.busy_fraction == pytest.approx(busy_s / answer_s)
    assert 0.5 < served.busy_fraction < 0.9


@pytest.mark.parametrize("rate", [0.5, 2.0, 6.0])
def test_continuous_batching_keeps_to_the_bounds(rate: float) -> None:
    """It waits no longer than elastic batches, which wait no longer than dynamic ones."""
    lengths = np.random.default_rng(2).integers(1, 41, 600)
    _, served = run(rate, 256, lengths)
    service = BatchService(prompt_s=0.0, prefill_s=0.0, row_token_s=0.005, step_s=0.02)
    elastic = mean_sojourn_bound(elastic_batch(service, 40, 20.5), rate)
    dynamic = mean_sojourn_bound(dynamic_batch(service, 40), rate)
    assert served.sojourn_s.mean() <= elastic <= dynamic
    assert served.sojourn_s.min() >= 0.025 * 0.999


def test_arrivals_have_their_rate() -> None:
    times = poisson_arrivals(4000, 5.0, seed=3)
    assert (np.diff(times) > 0).all()
    assert times[-1] == pytest.approx(4000 / 5.0, rel=0.05)
    assert (poisson_arrivals(10, 5.0, seed=3) == times[:10]).all()
