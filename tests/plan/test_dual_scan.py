"""The memory split's closed form, and that blending reaches a known optimum."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.plan.dual_scan import DualScan, MemorySplit, split_memory
from batchwright.plan.order import Order, Units


def test_golden_split() -> None:
    split = split_memory(60.0, 3.73, 0.096, 1.27)
    assert (round(split.left, 2), round(split.right, 2)) == (19.38, 40.62)


@given(st.floats(1, 1e12), st.floats(0.01, 1), st.floats(0.01, 100), st.floats(0.001, 0.999))
def test_split_has_the_mean_density(memory, right, difference, share) -> None:
    left = right + difference
    mean = right + share * difference
    split = split_memory(memory, left, right, mean)
    assert split.left + split.right == pytest.approx(memory, rel=1e-12)
    mixed = (split.left * left + split.right * right) / memory
    assert mixed == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize(
    "left, right, mean, expected",
    [(3.0, 1.0, 4.0, (1, 0)), (3.0, 1.0, 0.5, (0, 1)), (2.0, 2.0, 2.0, (0.5, 0.5))],
)
def test_split_of_degenerate_densities(left, right, mean, expected) -> None:
    assert split_memory(1.0, left, right, mean) == expected


def order_of(sizes: list[int], densities: list[float], kv: float = 1.0, mean: float = 1.0) -> Order:
    total = sum(sizes)
    units = Units(np.array(sizes), np.array(densities), mean, np.full(total, kv))
    return Order(np.arange(total, dtype=np.int32), units)


def test_two_kinds_are_blended_to_the_optimum() -> None:
    """n rows that only compute and n that only read, memory for one of each: n rounds, not 2n."""
    num = 10
    scan = DualScan(order_of([num, num], [2.0, 0.0]), kv_tokens=2.0)
    rounds = 0
    while first := scan.pick(MemorySplit(0.0, 0.0)):
        in_use = MemorySplit(1.0, 0.0) if first.is_left else MemorySplit(0.0, 1.0)
        second = scan.pick(in_use)
        assert (first.row < num) != (second.row < num), "two of a kind run together"
        rounds += 1
    assert rounds == num


def test_a_full_side_waits_and_the_other_goes_on() -> None:
    scan = DualScan(order_of([5, 5], [2.0, 0.0]), kv_tokens=4.0)
    assert scan.pick(MemorySplit(2.0, 1.0)).row == 5
    assert scan.pick(MemorySplit(1.0, 2.0)).row == 0
    assert scan.pick(MemorySplit(2.0, 2.0)) is None


def test_a_row_larger_than_its_share_starts_when_nothing_else_runs() -> None:
    scan = DualScan(order_of([2, 2], [2.0, 0.0], kv=9.0), kv_tokens=4.0)
    assert scan.pick(MemorySplit(0.0, 0.0)) is not None
    assert scan.pick(MemorySplit(9.0, 0.0)) is None


def test_a_row_without_room_holds_up_its_own_end_only() -> None:
    scan = DualScan(order_of([5, 5], [2.0, 0.0]), kv_tokens=4.0)
    nothing = MemorySplit(0.0, 0.0)
    assert scan.pick(nothing, but=[True]).row == 5
    assert scan.pick(MemorySplit(0.0, 2.0), but=[True]) is None
    assert scan.pick(nothing, but=[False]).row == 0
    assert scan.pick(nothing, but=[False, True]) is None


def test_prompts_are_spread_over_the_steps_for_which_memory_is_full() -> None:
    """2 x 1,000 prompt tokens; 2 x 100 tokens of memory for 10 Steps each, of 100: 20 Steps."""
    order = order_of([1, 1], [2.0, 0.0], kv=100.0)
    order = order._replace(units=order.units._replace(prompt_share=2000 / (2 * 100 * 10)))
    assert DualScan(order, kv_tokens=100.0).prompt_tokens == 128, "100, in whole tiles"
    assert DualScan(order, kv_tokens=200.0).prompt_tokens == 256


def test_prompts_are_spread_over_the_steps_for_which_slots_are_full() -> None:
    """20,000 prompt tokens; 100 rows hold 100 tokens for 10 steps each: 2 slots need 500 steps."""
    order = order_of([50, 50], [2.0, 0.0], kv=100.0)
    share = 20_000 / (100 * 100 * 10)
    order = order._replace(units=order.units._replace(prompt_share=share, kv_per_slot=100.0))
    assert DualScan(order, kv_tokens=1000.0).prompt_tokens == 256, "10 rows fit: 100 steps of 200"
    assert DualScan(order, kv_tokens=1000.0, num_slots=2).prompt_tokens == 128, "500 steps of 40"
    assert DualScan(order, kv_tokens=1000.0, num_slots=10).prompt_tokens == 256
    assert DualScan(order, kv_tokens=100.0, num_slots=10).prompt_tokens == 128, "memory is short"


def test_the_sides_keep_their_shares_where_slots_run_out_first() -> None:
    """Shares of 3 to 1 in memory for 4,000 rows: so they are in eight slots, whichever is freed."""
    scan = DualScan(order_of([500, 500], [2.0, 0.0], mean=1.5), kv_tokens=4000.0, num_slots=8)
    running = [scan.pick(MemorySplit(0.0, 0.0)).is_left]
    chance = random.Random(0)
    for _ in range(200):
        if len(running) == 8:
            assert sum(running) == 6
            running.pop(chance.randrange(8))
        left = float(sum(running))
        running.append(scan.pick(MemorySplit(left, len(running) - left)).is_left)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_every_row_is_picked_once_and_units_from_their_beginning(sizes, random) -> None:
    densities = sorted((random.random() * 5 for _ in sizes), reverse=True)
    scan = DualScan(order_of(sizes, densities, mean=2.0), kv_tokens=5.0)
    in_use = {True: 0.0, False: 0.0}
    picked, sides = [], []
    while True:
        pick = scan.pick(MemorySplit(in_use[True], in_use[False]))
        if pick is not None:
            picked.append(pick.row)
            sides.append(pick.is_left)
            in_use[pick.is_left] += pick.kv_tokens
        elif sides:
            in_use[sides.pop(random.randrange(len(sides)))] -= 1.0
        else:
            break
    assert sorted(picked) == list(range(sum(sizes)))
    ends = np.cumsum(sizes)
    for first, end in zip(ends - sizes, ends):
        rows = [row for row in picked if first <= row < end]
        assert rows == sorted(rows)
