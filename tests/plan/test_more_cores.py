"""The law for more cores, on made-up measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchwright.plan.cost import Hardware, RateCurve
from batchwright.plan.more_cores import CoreLaw, amdahl

ONE = Hardware(
    name="made up",
    num_threads=1,
    layers=RateCurve((1.0, 64.0), (10e9, 100e9)),
    head=RateCurve((1.0,), (50e9,)),
    ceiling_flops_per_s=110e9,
    attention_flops_per_s=60e9,
    kv_bytes_per_s=8e9,
    memory_bytes_per_s=10e9,
    token_s=4e-6,
    step_s=1e-3,
    draw_s=2e-5,
    busy=1.7,
)
TWO = replace(
    ONE,
    num_threads=2,
    layers=RateCurve((1.0, 64.0), (20e9, 160e9)),
    head=RateCurve((1.0,), (100e9,)),
    attention_flops_per_s=120e9,
    kv_bytes_per_s=16e9,
    token_s=3e-6,
    step_s=1.1e-3,
)
LAW = CoreLaw(one=ONE, two=TWO, weight_bytes=1.0, memory_bytes_per_s=1e12)


@pytest.mark.parametrize(
    ("one_s", "two_s", "num_threads", "seconds"),
    [
        (8.0, 4.0, 1, 8.0),
        (8.0, 4.0, 2, 4.0),
        (8.0, 4.0, 8, 1.0),
        (8.0, 5.0, 2, 5.0),
        (8.0, 5.0, 6, 3.0),  # 2 are serial
        (8.0, 3.0, 4, 2.0),  # more than twice as fast is noise
        (8.0, 9.0, 4, 8.0),  # and so is slower
    ],
)
def test_amdahl(one_s, two_s, num_threads, seconds):
    assert amdahl(one_s, two_s, num_threads) == pytest.approx(seconds)


def test_it_goes_through_what_was_measured():
    one, two = LAW.hardware(1), LAW.hardware(2)
    for law, measured in ((one, ONE), (two, TWO)):
        assert law.layers.flops_per_s == pytest.approx(measured.layers.flops_per_s)
        assert law.kv_bytes_per_s == pytest.approx(measured.kv_bytes_per_s)
        assert law.token_s == pytest.approx(measured.token_s)
    assert two.step_s == ONE.step_s and two.busy == 1.0 and two.num_threads == 2


def test_one_curve_may_have_more_points():
    longer = RateCurve((1.0, 64.0, 128.0), (20e9, 160e9, 180e9))
    curve = replace(LAW, two=replace(TWO, layers=longer)).hardware(2).layers
    assert curve.rows == longer.rows
    assert curve.flops_per_s == pytest.approx(longer.flops_per_s)


def test_serial_parts_bound_what_threads_give():
    many = LAW.hardware(10**6)
    assert many.layers.flops_per_s[1] == pytest.approx(400e9, rel=1e-3)  # a quarter is serial
    assert many.token_s == pytest.approx(2e-6, rel=1e-3)
    assert many.step_s == 1e-3


def test_memory_bounds_products_of_few_rows_and_keys():
    slow = replace(LAW, memory_bytes_per_s=40e9)
    hardware = slow.hardware(64)
    assert hardware.layers.flops_per_s[0] == 2 * 40e9  # one row: two FLOPs a byte
    assert hardware.layers.flops_per_s[1] == LAW.hardware(64).layers.flops_per_s[1]
    assert hardware.kv_bytes_per_s == hardware.memory_bytes_per_s == 40e9


def test_replicas_divide_the_memory_and_nothing_else():
    slow = replace(LAW, memory_bytes_per_s=40e9)
    assert slow.hardware(1, 8).kv_bytes_per_s == 5e9
    assert slow.hardware(1, 2).layers == ONE.layers
    assert LAW.hardware(4, 2) == replace(
        LAW.hardware(4), name="made up with 8 cores", memory_bytes_per_s=0.5e12
    )
