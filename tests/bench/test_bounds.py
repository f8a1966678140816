"""Bounds against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from batchwright.bench.bounds import Rates, best_rate, bounds
from batchwright.bench.necessary_work import necessary_work
from batchwright.bench.rates import ROWS, measure_rates
from batchwright.bench.workloads import WorkRequest
from batchwright.plan.cost import RateCurve
from batchwright.weights.forms import StoredForms
from tests.bench.tiny import TINY

LAYERS = RateCurve((2.0, 4.0, 8.0), (100.0, 160.0, 400.0))
HEAD = RateCurve((2.0, 4.0, 8.0), (50.0, 50.0, 80.0))
ATTENTION = RateCurve((2.0, 4.0, 8.0), (60.0, 100.0, 300.0))


def test_best_rate() -> None:
    assert best_rate(LAYERS, 2) == 100
    assert best_rate(LAYERS, 8) == best_rate(LAYERS, 1000) == 400
    # Times are straight between points: 4/160 = 0.025 and 8/400 = 0.02; 6 rows take 0.0225.
    assert best_rate(LAYERS, 6) == pytest.approx(6 / 0.0225)
    # One row takes as long as two.
    assert best_rate(LAYERS, 1) == pytest.approx(50)


def test_more_rows_are_never_worse() -> None:
    """A step of many rows can be run as several of fewer."""
    curve = RateCurve((2.0, 4.0, 8.0), (100.0, 300.0, 200.0))
    assert best_rate(curve, 8) == 300
    assert best_rate(curve, 100) == 300


def test_bounds_of_a_small_job() -> None:
    """Two rows with a common beginning: prompts 1 2 3 and 1 2 4, outputs of 4 and of 2 tokens."""
    work = necessary_work([WorkRequest([1, 2, 3], 4), WorkRequest([1, 2, 4], 2)], TINY)
    assert work.num_computed_tokens == 4 + 3 + 1
    assert work.longest_output == 4
    found = bounds(work, Rates(LAYERS, HEAD, ATTENTION))
    assert found.layer_rows == 2.0  # 8 tokens in at least 4 steps
    assert found.head_rows == 1.5  # 6 tokens
    num_keys = (1 + 2 + 3) + 3 + (4 + 5 + 6) + 4
    layers = 8 * TINY.layer_flops_per_token
    attention = num_keys * TINY.attention_flops_per_key
    head = 6 * TINY.head_flops_per_token
    assert found.plain_s == pytest.approx(layers / 400 + attention / 300 + head / 80)
    # 1.5 rows take as long as 2 at the head, so three quarters of its rate there.
    assert found.rows_aware_s == pytest.approx(layers / 100 + attention / 60 + head / (50 * 0.75))


def test_full_steps_make_both_bounds_equal() -> None:
    requests = [WorkRequest([row, *range(40)], 1) for row in range(20)]
    found = bounds(necessary_work(requests, TINY), Rates(LAYERS, HEAD, ATTENTION))
    assert found.layer_rows == 20 * 41 and found.head_rows == 20
    assert found.rows_aware_s == pytest.approx(found.plain_s)


def test_two_measurements_are_joined_point_by_point() -> None:
    a = Rates(*(RateCurve((1, 2), rates) for rates in ((5, 6), (3, 9), (1, 1))))
    b = Rates(*(RateCurve((1, 2), rates) for rates in ((4, 7), (8, 2), (1, 2))))
    assert a.best(b) == Rates(*(RateCurve((1, 2), rates) for rates in ((5, 7), (8, 9), (1, 2))))


@pytest.mark.cpu
def test_rates_are_measured_at_all_rows() -> None:
    forms = StoredForms("int4", "int8")
    for quantize in (None, "int8"):
        rates = measure_rates(
            TINY, torch.float32, seconds_per_point=1e-4, forms=forms, quantize=quantize
        )
        assert (rates.layers is rates.attention) == (quantize is None)
        for curve in rates:
            assert curve.rows == ROWS
            assert min(curve.flops_per_s) > 0
