"""Replicas: how many fit, and that their gain is bounded by what overlaps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.plan.advise.replicas import StepMix, num_replicas, replica_gain


def test_how_many_fit() -> None:
    sizes = {"weight_bytes": 16e9, "activation_bytes": 1e9, "kv_bytes": 3e9}
    assert num_replicas(80e9, **sizes) == 4
    assert num_replicas(79.9e9, **sizes) == 3
    assert num_replicas(10e9, **sizes) == 0


def test_by_hand() -> None:
    """2 s of nothing, 8 s of work: 3 s of arithmetic and 5 s of memory, one after the other."""
    step = StepMix(fixed_s=2, busy_s=8, compute_s=3, memory_s=5)
    assert replica_gain(step, 1, 0.0) == 1
    assert replica_gain(step, 2, 0.0) == pytest.approx(20 / 16)  # only the gaps are filled
    assert replica_gain(step, 2, 1.0) == pytest.approx(20 / 10)  # 2 x 5 s of memory take 10 s
    assert replica_gain(step, 4, 1.0) == pytest.approx(40 / 20)  # and more replicas nothing
    assert replica_gain(step, 2, 0.5) == pytest.approx(20 / 13)


SECONDS = st.floats(0.001, 10)


@given(SECONDS, SECONDS, st.floats(0, 1), st.floats(0, 1), st.integers(1, 9), st.floats(0, 1))
def test_bounds(fixed_s, busy_s, compute, memory, replicas, overlap) -> None:
    step = StepMix(fixed_s, busy_s, compute * busy_s, memory * busy_s)
    gain = replica_gain(step, replicas, overlap)
    assert 1 - 1e-9 <= gain <= replicas * (1 + 1e-9)
    assert gain <= replica_gain(step, replicas + 1, overlap) * (1 + 1e-9)
    assert gain <= replica_gain(step, replicas, 1.0) * (1 + 1e-9)
    serial = StepMix(0.0, busy_s, busy_s, 0.0)
    assert replica_gain(serial, replicas, overlap) == pytest.approx(1)  # nothing can overlap
