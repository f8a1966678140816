"""Invariants of every order, through the real engine and scheduler on a simulated model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.plan.length_predictor import find_predictor
from batchwright.techniques import names
from tests.engine.symbolic_engine import FaultyExecutor, answers, contents, mixed_job, new_engine
from tests.plan.simulated import BLOCK_SIZE, rows, simulate, simulated_engine
from tests.plan.tries import branching, job_of

ORDERS = names("plan.orders")

PROMPTS = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, 14), st.lists(st.integers(4, 9), min_size=1, max_size=9)
    ).map(lambda parts: [100 + parts[0]] * parts[1] + parts[2]),
    min_size=1,
    max_size=14,
)


def least_prefill(prompts: list[list[int]], starts: list[int]) -> int:
    """Distinct tokens at whole blocks, the rest of each prompt, and one token of each prompt that
    is whole blocks and was computed before."""
    distinct = job_of(prompts, block_size=BLOCK_SIZE).tree.num_distinct_tokens()
    rest = sum(len(prompt) % BLOCK_SIZE for prompt in prompts)
    fully_cached = 0
    seen: set[tuple[int, ...]] = set()
    for row in starts:
        prompt = prompts[row]
        fully_cached += len(prompt) % BLOCK_SIZE == 0 and tuple(prompt) in seen
        whole = range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE)
        seen.update(tuple(prompt[:end]) for end in whole)
    return distinct + rest + fully_cached


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=40)
@given(prompts=PROMPTS, data=st.data())
def test_prefill_is_the_optimum_when_memory_suffices(order: str, prompts, data) -> None:
    num_rows = len(prompts)
    outputs = data.draw(st.lists(st.integers(1, 12), min_size=num_rows, max_size=num_rows))
    job = rows(prompts, outputs)
    run = simulate(job, order)
    assert set(run.results) == {request.id for request in job}
    assert sorted(run.watched.starts) == list(range(num_rows))
    assert run.num_prefill_tokens(job) == least_prefill(prompts, run.watched.starts)
    assert run.stats.num_preemptions == run.stats.num_recomputed_tokens == 0
    assert max(run.watched.num_tokens) <= 32
    assert run.num_prefill_tokens(job) <= sum(map(len, prompts))
    alone = simulate(job, order, sharing=False)
    assert alone.num_prefill_tokens(job) == sum(map(len, prompts))


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=40)
@given(prompts=PROMPTS, data=st.data())
def test_every_row_ends_once_when_memory_is_short(order: str, prompts, data) -> None:
    num_rows = len(prompts)
    outputs = data.draw(st.lists(st.integers(1, 20), min_size=num_rows, max_size=num_rows))
    job = rows(prompts, outputs)
    longest = max(len(p) + d for p, d in zip(prompts, outputs))
    num_blocks = -(-longest // BLOCK_SIZE) + data.draw(st.integers(0, 4))
    run = simulate(job, order, num_blocks=num_blocks, budget=data.draw(st.integers(8, 40)))
    assert set(run.results) == {request.id for request in job}
    for request in job:
        (output,) = run.results[request.id].outputs
        assert len(output.token_ids) == request.params.max_tokens
    least = least_prefill(prompts, sorted(range(num_rows), key=lambda r: len(prompts[r])))
    assert run.num_prefill_tokens(job) >= least - num_rows
    assert run.watched.most_blocks <= num_blocks


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("num_blocks", [16, 60])
def test_answers_do_not_depend_on_the_order(num_blocks: int, look_ahead: int) -> None:
    """Mixed tasks, samples, stop strings; memory for one row or for all."""
    expected = None
    for order in ORDERS:
        engine, _ = new_engine(num_blocks=num_blocks, look_ahead=look_ahead, order=order)
        results = {key: contents(result) for key, result in answers(engine, mixed_job()).items()}
        expected = expected or results
        assert results == expected, order


@pytest.mark.parametrize("lengths", names("plan.lengths"))
@pytest.mark.parametrize("order", ["fcfs", "longest_first"])
def test_answers_do_not_depend_on_what_lengths_are_expected(order: str, lengths: str) -> None:
    engine, _ = new_engine(num_blocks=16)
    expected = {key: contents(result) for key, result in answers(engine, mixed_job()).items()}
    for num_blocks, look_ahead in ((16, 0), (22, 1)):
        engine, _ = new_engine(
            num_blocks=num_blocks,
            look_ahead=look_ahead,
            order=order,
            lengths=find_predictor(lengths),
        )
        results = {key: contents(result) for key, result in answers(engine, mixed_job()).items()}
        assert results == expected


@pytest.mark.parametrize("order", ORDERS)
def test_recovery_keeps_every_answer(order: str) -> None:
    """Steps fail now and then; what ran waits again, ahead of the plan."""
    healthy, _ = new_engine()
    expected = {key: contents(r) for key, r in answers(healthy, mixed_job()).items()}
    engine, executor = new_engine(order=order)
    assert isinstance(executor, FaultyExecutor)

    def every_fifth_step(step, ids) -> None:
        if executor.num_calls % 5 == 0:
            raise ValueError("a test's fault")

    executor.fault = every_fifth_step
    results = answers(engine, mixed_job())
    assert set(results) == set(expected)
    assert executor.num_failures > 3
    for key, result in results.items():
        assert result.error is not None or contents(result) == expected[key]


@pytest.mark.parametrize("order", ORDERS)
def test_the_first_row_ends_before_the_last_is_read(order: str, monkeypatch) -> None:
    """And rows that come while others run are started, each once."""
    monkeypatch.setattr("batchwright.engine.HORIZON", 40)
    job = rows([[5] * (1 + i % 30) + [10 + i % 7] for i in range(300)], 1)
    num_read = 0

    def source():
        nonlocal num_read
        for request in job:
            num_read += 1
            yield request

    engine = simulated_engine(order)[0]
    results = engine.run(source())
    first = next(results)
    assert num_read <= 41
    ids = [first.request_id, *(result.request_id for result in results)]
    assert sorted(ids) == sorted(request.id for request in job)


def test_rows_may_be_added_and_cancelled_at_any_time() -> None:
    for order in ORDERS:
        engine, _ = new_engine(order=order)
        results = {}
        for number, request in enumerate(mixed_job()):
            engine.add(request)
            if number % 3 == 2:
                engine.cancel(request.id)
            results |= {result.request_id: result for result in engine.step()}
        while engine.num_unfinished:
            results |= {result.request_id: result for result in engine.step()}
        assert set(results) == {request.id for request in mixed_job()}


def test_depth_first_computes_least_under_pressure() -> None:
    """A shuffled two-level tree in a tenth of the memory it would like."""
    prompts = tree_job()
    job = rows(prompts, 8)
    computed = {
        order: simulate(job, order, num_blocks=60).num_prefill_tokens(job) for order in ORDERS
    }
    least = job_of(prompts, block_size=BLOCK_SIZE).tree.num_distinct_tokens()
    least += sum(len(prompt) % BLOCK_SIZE for prompt in prompts)
    assert computed["prefix_dfs"] <= 1.02 * least
    assert computed["groups"] <= 1.1 * least
    assert computed["fcfs"] > 1.5 * least


def tree_job() -> list[list[int]]:
    prompts = [
        [20 + s] * 40 + [30 + b] * 30 + [1000 + s * 100 + b * 10 + q] * 5
        for s in range(6)
        for b in range(4)
        for q in range(6)
    ]
    return [prompts[i] for i in np.random.default_rng(3).permutation(len(prompts))]


def test_decode_heavy_groups_first_fill_the_steps() -> None:
    """Rows that only read, then rows that write long: in that order the end runs nearly empty."""
    prompts = [[i + 10] * 24 for i in range(40)]
    job = rows(prompts, [1] * 20 + [60] * 20)
    nearly_empty = {}
    for order in ("fcfs", "groups"):
        run = simulate(job, order, max_num_seqs=32, budget=32)
        nearly_empty[order] = sum(num < 24 for num in run.watched.num_tokens)
        assert sum(run.watched.num_tokens) == run.stats.num_computed_tokens
    assert nearly_empty["groups"] < nearly_empty["fcfs"]


def test_longest_first_shortens_the_tail() -> None:
    prompts = [[i + 10] * 4 for i in range(60)]
    job = rows(prompts, [8] * 56 + [100] * 4)
    steps = {o: simulate(job, o).stats.num_steps for o in ("fcfs", "longest_first")}
    assert steps["longest_first"] < 110  # 848 output tokens in 8 slots take 106
    assert steps["fcfs"] > 140


def test_cyclic_prefixes_are_computed_once_by_groups_and_every_time_by_recency() -> None:
    """k + 1 prefixes in turn, room for k: least recently used saves nothing."""
    num_prefixes, turns = 5, 6
    prompts = [[20 + p] * 40 + [100 + t, p] for t in range(turns) for p in range(num_prefixes)]
    job = rows(prompts, 2)
    run = simulate(job, "groups", num_blocks=4 * 10 + 2, max_num_seqs=1)
    assert run.num_prefill_tokens(job) == num_prefixes * 40 + len(prompts) * 2
    by_arrival = simulate(job, "fcfs", num_blocks=4 * 10 + 2, max_num_seqs=1)
    # Least recently used would compute all 30 prefixes; knowing the next use keeps most of them.
    assert by_arrival.num_prefill_tokens(job) < 0.5 * len(prompts) * 42


def test_samples_wait_with_their_row() -> None:
    prompts = branching(8, [(8, 3), (12, 2)])
    for order in ORDERS:
        run = simulate(rows(prompts, 5, n=3), order, num_blocks=16, max_num_seqs=4)
        assert all(len(result.outputs) == 3 for result in run.results.values())
