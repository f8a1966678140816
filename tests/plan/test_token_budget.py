"""The token budget by the cost model: tiles, saturation, memory, and what limits a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchwright.plan.cost import CostModel
from batchwright.plan.hardware import device_hardware, find_device
from batchwright.plan.model_shapes import find_model_shape
from batchwright.plan.token_budget import (
    activation_bytes_per_token,
    choose_token_budget,
    steady_step,
)
from tests.plan.test_cost import HARDWARE, SHAPE

LLAMA = find_model_shape("Llama-3-8B")
A100 = CostModel(LLAMA, device_hardware(find_device("A100-80G"), LLAMA, 2), 2, 2)


def choose(cost: CostModel = A100, **changes):
    job = {"num_prompt": 512, "num_output": 128, "max_num_seqs": 256}
    return choose_token_budget(cost, **(job | changes))


def test_a_step_has_prompts_and_decodes_in_the_ratio_of_the_job():
    step = steady_step(1000, num_prompt=300, num_output=100, max_num_seqs=256)
    assert (step.num_tokens, len(step.sample_tokens)) == (1000, 250)
    step = steady_step(4000, num_prompt=300, num_output=100, max_num_seqs=256)
    assert (step.num_tokens, len(step.sample_tokens)) == (4 * 256, 256), "all slots decode"
    step = steady_step(512, num_prompt=300, num_output=0, max_num_seqs=256)
    assert step.num_tokens == 512, "a job without output computes prompts alone"


def test_a_budget_of_one_more_than_a_tile_never_wins():
    found = choose(budgets=(256, 257), max_num_seqs=64)
    assert found.tokens_per_s[257] < found.tokens_per_s[256]
    assert found.budget == 256
    for tiles in (2, 4, 8):
        found = choose(budgets=(128 * tiles, 128 * tiles + 1))
        assert found.budget == 128 * tiles


def test_fixed_time_of_a_step_makes_large_budgets_pay_until_slots_are_full():
    """256 rows that decode take no more than 4 x 256 prompt tokens a step with them."""
    found = choose(replace(A100, hardware=replace(A100.hardware, step_s=0.02)))
    rates = list(found.tokens_per_s.values())
    assert rates == sorted(rates)
    assert found.tokens_per_s[2048] == found.tokens_per_s[4096]
    assert found.budget == 2048
    without = replace(A100, hardware=replace(A100.hardware, step_s=0.0))
    assert choose(without).budget < found.budget


def test_what_does_not_fit_is_left_out():
    per_token = activation_bytes_per_token(LLAMA, 2)
    assert per_token == 2 * (4096 + 28672 + 2 * 4096)
    assert set(choose(activation_bytes=1024 * per_token).tokens_per_s) == {256, 512, 1024}
    assert min(choose(max_num_seqs=600).tokens_per_s) == 1024
    assert choose(activation_bytes=1.0) == (256, {})


def test_where_the_rate_does_not_grow_the_smallest_is_taken():
    cost = CostModel(SHAPE, HARDWARE)
    found = choose(cost, num_prompt=8, num_output=2, max_num_seqs=10**6, budgets=(10**6,))
    assert found.budget == 10**6
    found = choose(cost, num_prompt=8, num_output=2, max_num_seqs=200)
    assert found.budget == 256
    assert found.tokens_per_s[256] == pytest.approx(found.tokens_per_s[1024], rel=0.01)
