"""How many devices: the fewest that meet a target, memory counted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.plan.advise.devices import Layout, smallest_layout


def amdahl(work_s: float, drain_s: float, fits_on: int = 1):
    """Seconds of a job that drains at the end; replicas have `fits_on` devices at least."""

    def seconds(layout: Layout) -> float | None:
        if layout.replica_size < fits_on:
            return None
        return work_s / layout.num_devices * (1 + 0.1 * (layout.replica_size > 1)) + drain_s

    return seconds


def test_by_hand() -> None:
    found, tried = smallest_layout(amdahl(100, 1), 21)
    assert found is not None
    assert found.layout == Layout(1, 5)
    assert found.seconds == pytest.approx(21)
    assert str(found.layout) == "5 devices: 5 replicas on one device each"
    assert found in tried


def test_what_does_not_fit_is_no_layout() -> None:
    found, _ = smallest_layout(amdahl(100, 0, fits_on=4), 1000)
    assert found is not None
    assert found.layout == Layout(4, 1)
    assert str(found.layout) == "4 devices: 1 replica on 4 devices each"


def test_a_target_out_of_reach() -> None:
    found, tried = smallest_layout(amdahl(100, 5), 4)
    assert found is None
    assert min(one.seconds for one in tried) > 4
    assert smallest_layout(lambda layout: None, 4) == (None, [])


def test_more_memory_than_linear() -> None:
    """One device has no room for keys and values: two are 20 times as fast, four 40 times."""
    times = {1: 1000.0, 2: 50.0, 3: 33.0, 4: 25.0}
    found, _ = smallest_layout(lambda one: times.get(one.num_devices, 10.0), 51.0)
    assert found is not None
    assert found.layout.num_devices == 2


@given(st.floats(1, 500), st.floats(0, 3), st.sampled_from([1, 2, 4, 8]), st.floats(4, 600))
def test_none_smaller_would_do(work_s, drain_s, fits_on, target_s) -> None:
    seconds = amdahl(work_s, drain_s, fits_on)
    found, _ = smallest_layout(seconds, target_s)
    possible = [
        Layout(size, number // size)
        for number in range(1, 65)
        for size in (1, 2, 4, 8)
        if number % size == 0 and (seconds(Layout(size, number // size)) or math.inf) <= target_s
    ]
    if not possible:
        assert found is None
        return
    assert found is not None
    fewest = min(layout.num_devices for layout in possible)
    assert found.layout.num_devices == fewest
    same = [seconds(layout) for layout in possible if layout.num_devices == fewest]
    assert found.seconds == min(same)
