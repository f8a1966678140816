"""What ranks send, by hand: to the formula, in every way of counting; nothing for one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batchwright.plan.cost import CostModel
from batchwright.plan.exchange import Link, with_exchange
from batchwright.plan.hardware import DEVICES, device_hardware, find_device
from batchwright.plan.model_shapes import find_model_shape
from batchwright.plan.order import rates_of
from batchwright.step import EqualSteps
from tests.plan.test_cost import HARDWARE, SHAPE, make_step

LINK = Link(bytes_per_s=1000.0, latency_s=0.01)


def seconds_sent(num_ranks: int, num_tokens: int, num_logits: int) -> float:
    """SHAPE has 3 layers, hidden size 2, vocabulary 7; elements of 4 bytes."""
    sums = 7 * 2 * (num_ranks - 1) / num_ranks * num_tokens * 2 * 4 / 1000
    logits = (num_ranks - 1) / num_ranks * num_logits * 7 * 4 / 1000
    return sums + logits + 9 * 0.01


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_a_step_takes_longer_by_what_is_sent(num_ranks):
    alone = CostModel(SHAPE, HARDWARE)
    both = replace(alone, hardware=with_exchange(HARDWARE, SHAPE, LINK, num_ranks, 4))
    step = make_step([(0, 3), (9, 10)], samples=[2, 3, 3])  # forks share their line of logits
    expected = seconds_sent(num_ranks, num_tokens=4, num_logits=2)
    assert both.seconds(step) - alone.seconds(step) == pytest.approx(expected)
    slots, positions = np.arange(3, dtype=np.int32), np.array([5, 6, 7], np.int32)
    steps = EqualSteps(slots[:0], slots, positions, num_steps=4)
    more_s = both.equal_seconds(steps) - alone.equal_seconds(steps)
    assert more_s == pytest.approx(4 * seconds_sent(num_ranks, num_tokens=3, num_logits=3))
    work_s = both.work_s(10, [0], 5, 5) - alone.work_s(10, [0], 5, 5)
    assert work_s == pytest.approx(seconds_sent(num_ranks, 10, 5) - 9 * 0.01)
    more_s = rates_of(both).compute_s_per_token - rates_of(alone).compute_s_per_token
    assert more_s == pytest.approx(seconds_sent(num_ranks, 1, 0) - 9 * 0.01)


def test_one_process_sends_nothing():
    assert with_exchange(HARDWARE, SHAPE, LINK, 1, 4) == HARDWARE
    shape, a100 = find_model_shape("Llama-3-8B"), find_device("A100-80G")
    alone = device_hardware(a100, shape, 2)
    assert (alone.token_s, alone.logits_s, alone.step_s) == (0, 0, a100.step_s)


@pytest.mark.parametrize(
    ("name", "gb_per_s"), [("A100-80G", 300), ("H100", 450), ("H200", 450), ("L40S", 32)]
)
@pytest.mark.parametrize("weight_bytes", [1, 2])
def test_devices_send_hidden_states_of_two_bytes(name, gb_per_s, weight_bytes):
    """A prompt of 1,000 tokens of Llama-3-8B on two: 65 sums of 8 KB a token, a line of logits."""
    assert name in DEVICES
    shape = find_model_shape("Llama-3-8B")
    profile = find_device(name)
    two = device_hardware(profile, shape, weight_bytes, num_devices=2)
    nothing = replace(two, token_s=0.0, logits_s=0.0, step_s=profile.step_s)
    step = make_step([(0, 1000)], samples=[999])
    both, rest = (CostModel(shape, one, 2, 2).seconds(step) for one in (two, nothing))
    sent_bytes = 65 * 1000 * 4096 * 2 + 128256
    assert both - rest == pytest.approx(sent_bytes / (0.8e9 * gb_per_s) + 67 * 10e-6)
