"""Limits of Steps: halved when memory runs out, and grown again with care."""

from __future__ import annotations

from batchwright.sched.limits import FIRST_WAIT_STEPS, StepLimits


def values(limits: StepLimits) -> tuple[int, int]:
    return limits.max_running, limits.max_tokens


def steps_until_growth(limits: StepLimits) -> int:
    before = values(limits)
    for number in range(1, 10**6):
        limits.step_succeeded()
        if values(limits) != before:
            return number
    raise AssertionError("they never grow")


def test_both_are_halved_down_to_a_minimum() -> None:
    limits = StepLimits(6, 100)
    seen = []
    while limits.halve():
        seen.append(values(limits))
    assert seen == [(3, 50), (1, 25), (1, 16)]
    assert not limits.halve()
    assert values(limits) == (1, 16)


def test_a_budget_below_the_minimum_is_kept() -> None:
    limits = StepLimits(2, 9)
    assert limits.halve()
    assert values(limits) == (1, 9)
    assert not limits.halve()


def test_they_grow_step_by_step_to_what_was_given_and_no_further() -> None:
    limits = StepLimits(6, 100)
    while limits.halve():
        pass
    grown = []
    for _ in range(3):
        assert steps_until_growth(limits) == FIRST_WAIT_STEPS
        grown.append(values(limits))
    assert grown == [(2, 32), (4, 64), (6, 100)]
    for _ in range(3 * FIRST_WAIT_STEPS):
        limits.step_succeeded()
    assert values(limits) == (6, 100)


def test_each_growth_that_fails_doubles_the_wait() -> None:
    limits = StepLimits(8, 64)
    limits.halve()
    for attempt in range(5):
        assert steps_until_growth(limits) == FIRST_WAIT_STEPS * 2**attempt
        assert values(limits) == (8, 64)
        assert limits.halve()
        assert values(limits) == (4, 32)


def test_failures_in_a_row_count_once() -> None:
    limits = StepLimits(8, 64)
    limits.halve()
    steps_until_growth(limits)
    limits.halve()
    limits.halve()
    assert steps_until_growth(limits) == 2 * FIRST_WAIT_STEPS


def test_good_steps_are_counted_from_the_last_failure() -> None:
    limits = StepLimits(8, 64)
    limits.halve()
    for _ in range(FIRST_WAIT_STEPS - 1):
        limits.step_succeeded()
    limits.halve()
    assert steps_until_growth(limits) == FIRST_WAIT_STEPS


def test_a_failure_at_the_minimum_begins_the_count_anew() -> None:
    limits = StepLimits(1, 16)
    assert not limits.halve()
    limits = StepLimits(2, 16)
    limits.halve()
    for _ in range(FIRST_WAIT_STEPS - 1):
        limits.step_succeeded()
    assert not limits.halve()
    assert steps_until_growth(limits) == FIRST_WAIT_STEPS
