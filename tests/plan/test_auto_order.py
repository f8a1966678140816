"""AutoOrder: what it tries, what it takes, what that costs; and the simulation behind it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from batchwright.exec.sim import LinearCost
from batchwright.kv.groups import KVGroup
from batchwright.order_trial import Trial
from batchwright.plan.auto_order import (
    MAX_SHARE_OF_RUN,
    SIMULATED_ROUND_S,
    UNTRIED,
    AutoOrder,
    Prediction,
    sample_of,
    shared_tokens,
)
from batchwright.plan.job_tree import build_job_tree
from batchwright.plan.order import JobFacts, find_order
from batchwright.simulate import EngineSizes
from batchwright.techniques import names
from tests.plan.simulated import BLOCK_SIZE, rows, simulate
from tests.plan.tries import job_of

ORDERS = names("plan.orders")
STEP_S, TOKEN_S = 0.01, 0.01


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
    """Passes predictions on and counts the Steps simulated."""

    def __init__(self, simulated: Trial) -> None:
        self.simulated, self.num_rounds, self.num_calls = simulated, 0, 0

    def __call__(self, job, order, share) -> Prediction:
        prediction = self.simulated(job, order, share)
        self.num_rounds += prediction.num_rounds
        self.num_calls += 1
        return prediction


def test_where_memory_is_short_and_prefixes_are_shared_it_leaves_arrival() -> None:
    job = job_of(tree_prompts(), 8, block_size=BLOCK_SIZE)
    predict = Counting(engine(num_blocks=60))
    auto = AutoOrder(predict, ORDERS)
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
    auto = AutoOrder(Counting(engine(num_blocks=4000)), ORDERS)
    assert auto(job_of(prompts, 6)).rows.tolist() == list(range(200))
    assert auto.choice is not None and auto.choice.name == "fcfs"


def test_it_tries_when_the_rows_have_become_many_more_and_not_before() -> None:
    predict = Counting(engine(num_blocks=4000))
    auto = AutoOrder(predict, ORDERS)
    prompts = [[row + 10] * 9 for row in range(1000)]
    calls = []
    for num_rows in (5, 100, 300, 390, 500, 1000):
        auto(job_of(prompts[:num_rows], 6))
        calls.append(predict.num_calls)
    assert calls[0] == 0 < calls[1] == calls[2] == calls[3] < calls[4] == calls[5]


def test_a_short_job_is_not_worth_trying() -> None:
    quick = engine(num_blocks=4000)
    auto = AutoOrder(Counting(quick), ORDERS)
    auto._predict = lambda job, order, share: Prediction(0.1, 500)
    auto(job_of([[row + 10] * 9 for row in range(50)], 6))
    assert auto.choice is not None and auto.choice.name == UNTRIED
    assert "too few" in str(auto.choice)


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
