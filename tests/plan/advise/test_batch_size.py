"""B_opt: the closed form, what the real scheduler says, and what must be monotone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.errors import ConfigError
from batchwright.exec.sim import LinearCost
from batchwright.plan.advise.batch_size import ProfilePoint, best_batch
from tests.plan.advise.linear_engine import run_linear


def linear_profile(fixed_s: float, row_s: float, most: int) -> list[ProfilePoint]:
    """step(B) = a + b B, so T(B) = B / (a + b B) and L(B) = a + b B."""
    steps = {size: fixed_s + row_s * size for size in range(1, most + 1)}
    return [ProfilePoint(size, size / step_s, step_s, size) for size, step_s in steps.items()]


def test_golden_value() -> None:
    assert best_batch(linear_profile(10, 0.5, 200), epsilon=0.2).batch_size == 84


@pytest.mark.parametrize(
    "fixed_s, row_s, epsilon", [(10, 0.5, 0.2), (10, 0.5, 0.1), (3, 0.25, 0.3), (7, 1, 0.5)]
)
def test_closed_form(fixed_s: float, row_s: float, epsilon: float) -> None:
    bound = ((fixed_s + row_s) / epsilon - fixed_s) / row_s
    expected = math.ceil(round(bound, 6)) - 1  # the largest whole number below it
    assert best_batch(linear_profile(fixed_s, row_s, 500), epsilon=epsilon).batch_size == expected


def test_the_scheduler_on_a_linear_cost_gives_the_golden_value() -> None:
    """Prompts of one token: every token of a row costs the same, so T(B) is that of the formula."""
    cost = LinearCost(step_s=10.0, token_s=0.5, key_s=0.0)
    profile = []
    for size in (1, 83, 84, 85, 86):
        seconds, num_tokens = run_linear(cost, [(1, 6)] * size, max_num_seqs=size)
        profile.append(ProfilePoint(size, num_tokens / seconds, seconds / 6, 0))
    assert best_batch(profile, epsilon=0.2).batch_size == 84


def test_latency_limits_the_batch() -> None:
    profile = linear_profile(10, 0.5, 200)
    assert best_batch(profile, slo_s=20.0).batch_size == 20
    with pytest.raises(ConfigError, match=r"every 10 ms is out of reach: the least is 1\.05e\+04"):
        best_batch(profile, slo_s=0.01)


PROFILES = st.lists(
    st.tuples(st.integers(2, 600), st.floats(0.1, 100), st.floats(0.001, 10)),
    unique_by=lambda point: point[0],
    max_size=8,
)


@given(PROFILES, st.floats(0.01, 0.9), st.floats(0.01, 0.9), st.floats(0, 9), st.floats(0, 9))
def test_what_must_be_monotone(profile, epsilon, other, slo_s, other_slo_s) -> None:
    """A smaller epsilon never lowers B_opt, a tighter limit never raises it; T is as asked."""
    points = [ProfilePoint(1, 1.0, 0.0, 0), *(ProfilePoint(b, t, s, 0) for b, t, s in profile)]
    low, high = sorted((epsilon, other))
    tight, loose = sorted((slo_s, other_slo_s))
    chosen = best_batch(points, epsilon=low, slo_s=loose)
    assert chosen.batch_size >= best_batch(points, epsilon=high, slo_s=loose).batch_size
    assert chosen.batch_size >= best_batch(points, epsilon=low, slo_s=tight).batch_size
    assert chosen.tokens_per_s >= low * chosen.batch_size * 1.0
    assert chosen.token_s <= loose
