"""Admission by expected lengths, through the real engine and scheduler on a simulated model."""

from __future__ import annotations

import numpy as np
import pytest

from batchwright.plan.length_predictor import Lengths, Rows, find_predictor
from batchwright.request import Request, SamplingParams
from batchwright.techniques import names
from tests.plan.simulated import BLOCK_SIZE, Watched, simulated_engine

NUM_BLOCKS = 60


class Oracle:
    """Knows the lengths, times `scale`."""

    def __init__(self, true: dict[bytes, int], scale: float = 1.0) -> None:
        self.true, self.scale = true, scale

    def learn(self, rows: Rows, output: np.ndarray) -> None:
        pass

    def predict(self, rows: Rows, so_far: np.ndarray) -> Lengths:
        known = np.array([self.true[p.tobytes()] for p in rows.prompts]) * self.scale
        return Lengths(known, known)


def job(num_rows: int = 120, seed: int = 3) -> tuple[list[Request], dict[bytes, int]]:
    """Rows that may have 90 tokens and have 1 to 90; a third share a prefix, a fifth are sampled
    twice."""
    random = np.random.default_rng(seed)
    requests, true = [], {}
    for index in range(num_rows):
        shared = [7] * 14 if index % 3 == 0 else []
        prompt = np.array([*shared, 100 + index, *random.integers(10, 99, index % 23)], np.int32)
        params = SamplingParams(max_tokens=90, n=2 if index % 5 == 0 else 1, seed=index)
        requests.append(Request(id=f"r{index}", prompt_token_ids=prompt, params=params))
        true[prompt.tobytes()] = int(random.integers(1, 91) if index % 2 else random.integers(1, 9))
    return requests, true


def run(lengths, *, order: str = "fcfs", look_ahead: int = 0) -> tuple[Watched, dict[str, int]]:
    """Runs the job; returns how it went, and the output tokens of each row. Nothing is lost."""
    requests, true = job()
    predictor = lengths(true)
    engine, watched, _ = simulated_engine(
        order,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=24,
        budget=48,
        lengths=predictor,
        true_length=lambda new: true[new.token_ids[: new.num_prompt_tokens].tobytes()],
        look_ahead=look_ahead,
    )
    if isinstance(predictor, Oracle):  # it need not wait until others have ended
        add = watched.scheduler.add

        def add_known(sequence, **options) -> None:
            add(sequence, **options)
            watched.scheduler.expected.estimate([sequence])

        watched.scheduler.add = add_known
    drawn = {}
    for result in engine.run(requests):
        assert result.error is None and result.request_id not in drawn
        drawn[result.request_id] = [len(output.token_ids) for output in result.outputs]
    engine.check_integrity()
    assert all(t.pool.num_free == t.pool.num_blocks for t in watched.scheduler.books.tables)
    for request in requests:
        length = true[request.prompt_token_ids.tobytes()]
        assert drawn[request.id] == [length] * request.params.n
    return watched, drawn


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("order", ["fcfs", "longest_first", "density"])
def test_nothing_is_preempted_by_who_knows_the_lengths(order: str, look_ahead: int) -> None:
    watched, _ = run(Oracle, order=order, look_ahead=look_ahead)
    stats = watched.scheduler.stats
    assert stats.num_preemptions == stats.num_recomputed_tokens == 0
    assert watched.most_blocks > 0.9 * NUM_BLOCKS, "memory was not used"


@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_half_the_length_costs_preemptions_and_nothing_else(scale: float) -> None:
    watched, drawn = run(lambda true: Oracle(true, scale))
    assert watched.scheduler.stats.num_preemptions > 0
    assert drawn == run(Oracle)[1]


def test_all_that_rows_may_have_is_safe_and_slow() -> None:
    declared, _ = run(lambda true: find_predictor("declared"))
    known, _ = run(Oracle)
    assert declared.scheduler.stats.num_preemptions == 0
    assert declared.scheduler.stats.num_steps > 1.2 * known.scheduler.stats.num_steps


@pytest.mark.parametrize("name", names("plan.lengths"))
def test_every_predictor_loses_nothing(name: str) -> None:
    if name == "self_report":
        pytest.skip("asks the model: tests/engine/test_length_questions.py")
    run(lambda true: find_predictor(name))


def test_who_learns_is_faster_than_all_that_rows_may_have() -> None:
    declared, learned = run(lambda true: find_predictor("declared"))[0], run(subtree)[0]
    assert learned.scheduler.stats.num_steps < declared.scheduler.stats.num_steps


def subtree(true):
    return find_predictor("subtree")


@pytest.mark.parametrize("order", ["prefix_dfs", "groups", "density"])
def test_the_last_rows_start_longest_first(order: str) -> None:
    """As many as run at once: what is left then is one more turn."""
    prompts = [[10 + index] * 4 for index in range(40)]
    outputs = [5] * 24 + [5, 60, 5, 40, 5, 80] + [5] * 10
    engine, watched, _ = simulated_engine(order, max_num_seqs=16, budget=64)
    requests = [
        Request(
            id=f"r{index}",
            prompt_token_ids=np.array(prompt, np.int32),
            params=SamplingParams(max_tokens=num, ignore_eos=True, seed=index),
        )
        for index, (prompt, num) in enumerate(zip(prompts, outputs, strict=True))
    ]
    assert len(list(engine.run(requests))) == 40
    last = [outputs[row] for row in watched.starts[-16:]]
    assert last == sorted(last, reverse=True)


def test_first_come_first_served_stays_so() -> None:
    engine, watched, _ = simulated_engine("fcfs", max_num_seqs=4, budget=32)
    requests = [
        Request(
            id=f"r{index}",
            prompt_token_ids=np.full(BLOCK_SIZE, index + 5, np.int32),
            params=SamplingParams(max_tokens=1 + index % 7, ignore_eos=True, seed=index),
        )
        for index in range(20)
    ]
    list(engine.run(requests))
    assert watched.starts == list(range(20))
