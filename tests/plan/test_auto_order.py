"""AutoOrder: what it tries, what it takes, what that costs; and the simulation behind it."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from batchwright.config import EngineConfig
from batchwright.exec.sim import LinearCost
from batchwright.kv.groups import KVGroup
from batchwright.order_trial import Trial, chosen_order
from batchwright.plan.auto_order import (
    MAX_SHARE_OF_RUN,
    MOST_ROUNDS,
    SIMULATED_ROUND_S,
    UNTRIED,
    YARDSTICK,
    AutoOrder,
    Measured,
    Prediction,
    sample_of,
    shared_tokens,
)
from batchwright.plan.cost import CostModel
from batchwright.plan.job_tree import build_job_tree
from batchwright.plan.order import JobFacts, Rates, find_order
from batchwright.plan.shape import Product
from batchwright.simulate import EngineSizes
from batchwright.techniques import names
from tests.plan.simulated import BLOCK_SIZE, rows, simulate
from tests.plan.test_cost import HARDWARE, SHAPE
from tests.plan.tries import job_of

ORDERS = names("plan.orders")
STEP_S, TOKEN_S = 0.01, 0.01
RATES = Rates(TOKEN_S, 0.0, 1e-4, rows_per_load=4)


def tree_prompts(num_systems: int = 12) -> list[list[int]]:
    prompts = [
        [20 + s] * 40 + [90 + b] * 30 + [1000 + s * 100 + b * 10 + q] * 5
        for s in range(num_systems)
        for b in range(4)
        for q in range(6)
    ]
    random.Random(1).shuffle(prompts)
    return prompts


def engine(num_blocks: int, max_num_seqs: int = 8) -> Trial:
    sizes = EngineSizes(
        groups=[KVGroup(None, num_blocks)],
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=32,
        max_model_len=256,
    )
    return Trial(sizes, LinearCost(STEP_S, TOKEN_S, 0.0))


class Counting:
    """Passes predictions on and counts the Steps simulated, and how often it was measured."""

    def __init__(self, simulated: Trial, measure_s: float = 0.0) -> None:
        self.simulated, self.num_rounds, self.num_calls = simulated, 0, 0
        self.measure_s, self.num_measured = measure_s, 0

    def measure(self) -> Measured:
        self.num_measured += 1
        return Measured(self, RATES, self.measure_s)

    def auto(self, token_s: float = TOKEN_S) -> AutoOrder:
        return AutoOrder(self.measure, ORDERS, measure_s=self.measure_s, token_s=token_s)

    def __call__(self, job, order, share) -> Prediction:
        prediction = self.simulated(job, order, share)
        self.num_rounds += prediction.num_rounds
        self.num_calls += 1
        return prediction


def test_where_memory_is_short_and_prefixes_are_shared_it_leaves_arrival() -> None:
    job = job_of(tree_prompts(), 8, block_size=BLOCK_SIZE)
    predict = Counting(engine(num_blocks=60))
    auto = predict.auto()
    order = auto(job)
    assert auto.choice is not None and auto.choice.name != "fcfs"
    assert auto.choice.seconds[auto.choice.name] < 0.7 * auto.choice.seconds["fcfs"]
    assert order.rows.tolist() == find_order(auto.choice.name)(job).rows.tolist()
    spent_s = predict.num_rounds * SIMULATED_ROUND_S
    assert spent_s < 1.2 * MAX_SHARE_OF_RUN * auto.choice.seconds["fcfs"]
    text = str(auto.choice)
    assert text.startswith(f"order {auto.choice.name}: ") and "fcfs" in text


def test_where_nothing_is_won_rows_run_as_they_come() -> None:
    prompts = [[row + 10] * (5 + row % 9) for row in range(200)]
    auto = Counting(engine(num_blocks=4000)).auto()
    assert auto(job_of(prompts, 6)).rows.tolist() == list(range(200))
    assert auto.choice is not None and auto.choice.name == "fcfs"


def test_it_tries_when_the_rows_have_become_many_more_and_not_before() -> None:
    predict = Counting(engine(num_blocks=4000))
    auto = predict.auto()
    prompts = [[row + 10] * 9 for row in range(1000)]
    calls = []
    for num_rows in (5, 100, 300, 390, 500, 1000):
        auto(job_of(prompts[:num_rows], 6))
        calls.append(predict.num_calls)
    assert calls[0] == 0 < calls[1] == calls[2] == calls[3] < calls[4] == calls[5]
    assert predict.num_measured == 1


def test_a_job_that_measuring_would_slow_down_is_not_measured() -> None:
    """24 x 76 tokens share all but 5 each: 2 % of the time of the least that is computed."""
    shared, alone = tree_prompts(1), [[row + 10] * 9 for row in range(24)]
    for prompts, expected in ((shared, UNTRIED), (alone, YARDSTICK)):
        job = job_of(prompts, 8, block_size=1)
        tokens = job.tree.num_distinct_tokens() + 24 * 8
        predict = Counting(engine(num_blocks=4000), MAX_SHARE_OF_RUN * TOKEN_S * tokens * 1.01)
        auto = predict.auto()
        auto(job)
        assert predict.num_measured == predict.num_calls == 0
        assert auto.choice is not None and auto.choice.name == expected
        assert "too little work" in str(auto.choice)
        predict.measure_s *= 0.98
        predict.auto()(job)
        assert predict.num_measured == 1


def test_when_measuring_took_all_the_time_nothing_is_tried() -> None:
    """It took longer than it should have; the rest is a guess on few rows."""
    predict = Counting(engine(num_blocks=60))
    auto = predict.auto()
    predict.measure_s = 1e6
    auto(job_of(tree_prompts(), 8, block_size=BLOCK_SIZE))
    assert predict.num_measured == predict.num_calls == 1
    assert auto.choice is not None and auto.choice.name == UNTRIED


def test_a_long_job_is_not_tried_for_longer_than_a_choice_needs() -> None:
    """An hour a row: 2 % of the run would pay for simulating all of it."""
    sizes = EngineSizes(
        groups=[KVGroup(None, 4000)],
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        max_model_len=256,
    )
    slow = Trial(sizes, LinearCost(3600.0, 0.0, 0.0))
    predict = Counting(slow)
    outputs = [50.0 + row % 97 for row in range(20_000)]
    predict.auto()(job_of([[row + 10] * 9 for row in range(20_000)], outputs))
    assert MOST_ROUNDS / 4 < predict.num_rounds < 1.5 * MOST_ROUNDS  # equal orders run once


def test_measured_rates_reach_the_order() -> None:
    seen = []

    def spy(job, order, share):
        seen.append(job.rates)
        return Prediction(1e6, 10)

    auto = AutoOrder(lambda: Measured(spy, RATES, 0.0), ORDERS, measure_s=0.0, token_s=1.0)
    auto(job_of(tree_prompts(), 8))
    assert seen and set(seen) == {RATES}


def test_an_engine_measures_when_that_pays_and_once() -> None:
    """10 s a token at least, of a model of 1,000 layers, of which 4 are measured."""
    shape = replace(SHAPE, num_layers=1000, products=(Product(10**6, 10**6),))
    config = EngineConfig(order="auto", num_threads=2, max_num_seqs=8).resolve(
        context_length=256, free_memory_bytes=10**9
    )
    calls = []

    def measure() -> CostModel:
        calls.append(1)
        return CostModel(shape, replace(HARDWARE, busy=2.0), rows_per_load=4)

    order = chosen_order(config, [KVGroup(None, 4000)], shape, measure)
    for num_rows, expected in ((20, 0), (300, 1), (1300, 1)):
        job = job_of([[row + 10] * 9 for row in range(num_rows)], 6)
        assert sorted(order(job).rows.tolist()) == list(range(num_rows))
        assert len(calls) == expected
    assert isinstance(order, AutoOrder) and order.choice is not None
    assert order.choice.seconds["fcfs"] > 2 * 1300 * 14 * 2e12 / 100, "twice as long as quiet"
    assert chosen_order(
        replace(config, order="groups"), [KVGroup(None, 9)], shape, measure
    ) is find_order("groups")


def test_beside_the_engine_nothing_is_measured() -> None:
    """Who orders lines while the engine runs knows what the engine measured, or nothing."""
    job = job_of(tree_prompts(), 8)
    predict = Counting(engine(4000), measure_s=1e-3)
    auto = predict.auto(token_s=1.0)
    beside = auto.beside_engine()
    beside(job)
    assert predict.num_measured == 0 and beside.choice.name == UNTRIED
    auto.measure_for(1e-3)
    assert predict.num_measured == 0, "that would not pay"
    auto.measure_for(1e6)
    auto.measure_for(1e6)
    assert predict.num_measured == 1
    knowing = auto.beside_engine()
    knowing(job)
    assert predict.num_measured == 1 and set(knowing.choice.seconds) == set(ORDERS)
    assert auto.choice is None


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_blocks", [60, 4000])
def test_a_prediction_of_all_rows_is_the_simulated_run(order: str, num_blocks: int) -> None:
    """Up to the order of nodes that are equal to the order, which tokens decide."""
    prompts = tree_prompts(3)
    job = job_of(prompts, 8, block_size=BLOCK_SIZE)
    prediction = engine(num_blocks)(job, find_order(order))
    run = simulate(rows(prompts, 8), order, num_blocks=num_blocks)
    seconds = STEP_S * run.stats.num_steps + TOKEN_S * run.stats.num_computed_tokens
    assert prediction.seconds == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize("order", ["fcfs", "prefix_dfs"])
@pytest.mark.parametrize("num_blocks", [60, 4000])
def test_a_sample_tells_the_time_of_the_whole(order: str, num_blocks: int) -> None:
    job = job_of(tree_prompts(), 8, block_size=BLOCK_SIZE)
    whole = engine(num_blocks)(job, find_order(order)).seconds
    part = sample_of(job, 150)
    told = engine(num_blocks)(part, find_order(order), part.num_rows / job.num_rows)
    assert told.seconds == pytest.approx(whole, rel=0.2)


def test_a_sample_shares_as_the_job_does() -> None:
    job = job_of(tree_prompts(), np.arange(288) % 7, block_size=1)
    sample = sample_of(job, 100)
    assert sample.num_rows in range(90, 101)
    assert saved(sample) == pytest.approx(saved(job), abs=0.06)
    assert sample_of(job, 288) is job
    assert set(sample.num_output_tokens) == set(range(7))


def saved(job: JobFacts) -> float:
    return 1 - job.tree.num_distinct_tokens() / job.num_prompt_tokens.sum()


def test_made_up_prompts_have_the_same_tree() -> None:
    tree = job_of([[1, 2, 3, 4], [1, 2, 5], [1, 2], [7], [1, 2, 5]]).tree
    paths = shared_tokens(tree, np.arange(5))
    assert [len(path) for path in paths] == [4, 3, 2, 1, 3]
    again = build_job_tree(np.concatenate(paths), np.cumsum([0, *map(len, paths)]))
    assert again.depth[again.node_of_row].tolist() == tree.depth[tree.node_of_row].tolist()
    assert sorted(again.num_users.tolist()) == sorted(tree.num_users.tolist())


def test_rows_without_output_are_simulated_too() -> None:
    job = job_of([[1, 2, 3], [4, 5]], [0, 3])
    assert engine(10)(job, find_order("density")).num_rounds > 0
