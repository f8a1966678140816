"""Golden values of BlendServe's densities, and what parting may cost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.plan.job_tree import ROOT
from batchwright.plan.order import Rates
from batchwright.plan.orders.density import (
    RECOMPUTED_SHARE,
    density,
    density_of,
    node_work,
    parted_nodes,
    row_work,
)
from tests.plan.tries import job_of, num_computed

LLAMA_8B_ON_A100 = Rates(
    compute_s_per_token=2 * 8.03e9 / 312e12, memory_s_per_key=131_072 / 2.039e12
)


@pytest.mark.parametrize(
    "prompt, output, expected",
    [
        (512, 256, 3.754),
        (100, 16384, 0.097),
        (1024, 1024, 1.043),
        (2048, 128, 6.445),
        (1024, 16, 50.4),
    ],
)
def test_golden_densities(prompt: int, output: int, expected: float) -> None:
    work = row_work(LLAMA_8B_ON_A100, np.array([prompt]), np.array([output]))
    digits = 1 if expected > 10 else 3
    assert round(float(density_of(*work)[0]), digits) == expected


def test_attention_of_long_prompts_counts() -> None:
    rates = Rates(1.0, 0.5, 1.0)
    compute_s, memory_s = row_work(rates, np.array([10]), np.array([4.0]))
    assert compute_s.tolist() == [10 + 4 + 50.0]
    assert memory_s.tolist() == [10 * 4 + 8.0]


def test_density_of_rows_without_output_is_capped() -> None:
    assert density_of(np.array([5.0, 0.0]), np.array([0.0, 0.0])).tolist() == [1000.0, 0.0]


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


@settings(max_examples=150)
@given(PROMPTS, st.data())
def test_work_of_nodes_counts_shared_tokens_once(prompts, data: st.DataObject) -> None:
    outputs = data.draw(st.lists(st.integers(0, 5), min_size=len(prompts), max_size=len(prompts)))
    job = job_of(prompts, outputs)
    tree, work = job.tree, node_work(job)
    for node in range(tree.num_nodes):
        users = tree.rows[tree.first[node] : tree.end[node]].tolist()
        distinct = {tuple(prompts[r][:end]) for r in users for end in range(1, len(prompts[r]) + 1)}
        compute_s = len(distinct) + sum(outputs[r] for r in users)
        assert work.compute_s[node] == pytest.approx(compute_s)
        memory_s = sum(len(prompts[r]) * outputs[r] + outputs[r] ** 2 / 2 for r in users)
        assert work.memory_s[node] == pytest.approx(memory_s)


@settings(max_examples=150)
@given(PROMPTS, st.data(), st.integers(2, 4))
def test_shared_keys_are_read_once_where_attention_does_so(prompts, data, rows_per_load) -> None:
    """d p_unique + d^2 / 2 + d p_shared / g, with g the users of each token, at most so many."""
    outputs = data.draw(st.lists(st.integers(0, 5), min_size=len(prompts), max_size=len(prompts)))
    job = replace(job_of(prompts, outputs), rates=Rates(rows_per_load=rows_per_load))
    memory_s = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        users = [sum(p[:end] == prompt[:end] for p in prompts) for end in range(1, len(prompt) + 1)]
        memory_s += output**2 / 2 + sum(output / min(g, rows_per_load) for g in users)
    assert node_work(job).memory_s[ROOT] == pytest.approx(memory_s)
    assert node_work(job).own_memory_s.sum() == pytest.approx(memory_s)


@settings(max_examples=150)
@given(PROMPTS, st.data(), st.integers(0, 30))
def test_parting_stays_in_its_budget(prompts, data: st.DataObject, budget: int) -> None:
    outputs = data.draw(st.lists(st.integers(0, 50), min_size=len(prompts), max_size=len(prompts)))
    job = job_of(prompts, outputs)
    tree = job.tree
    is_parted = parted_nodes(tree, node_work(job), budget)
    assert is_parted.sum() <= tree.num_rows
    cost = 0
    for node in np.flatnonzero(is_parted).tolist():
        assert node == ROOT or is_parted[tree.parent[node]]
        num_parts = np.count_nonzero(tree.parent == node) + (tree.num_ending[node] > 0)
        cost += max(num_parts - 1, 0) * tree.depth[node]
    assert cost <= budget


@settings(max_examples=100)
@given(PROMPTS, st.data())
def test_units_lose_at_most_their_share(prompts, data: st.DataObject) -> None:
    outputs = data.draw(st.lists(st.integers(0, 50), min_size=len(prompts), max_size=len(prompts)))
    stretched = [[token for token in prompt for _ in range(40)] for prompt in prompts]
    job = job_of(stretched, outputs)
    computed = num_computed(stretched, density(job).rows.tolist())
    shared = sum(map(len, stretched)) - job.tree.num_distinct_tokens()
    assert computed - job.tree.num_distinct_tokens() <= RECOMPUTED_SHARE * shared


@settings(max_examples=100)
@given(PROMPTS, st.data())
def test_siblings_are_sorted_by_density(prompts, data: st.DataObject) -> None:
    outputs = data.draw(st.lists(st.integers(0, 50), min_size=len(prompts), max_size=len(prompts)))
    job = job_of(prompts, outputs)
    tree, work = job.tree, node_work(job)
    rows, first_line = tree.depth_first(-work.density)
    for parent in range(tree.num_nodes):
        children = [n for n in range(1, tree.num_nodes) if tree.parent[n] == parent]
        by_place = sorted(children, key=lambda node: first_line[node])
        densities = work.density[by_place]
        assert (np.diff(densities) <= 0).all()
        before = tree.rows[tree.first[parent] : tree.end[parent]]
        after = rows[first_line[parent] : first_line[parent] + len(before)]
        assert sorted(before) == sorted(after)
    assert num_computed(prompts, rows.tolist()) == tree.num_distinct_tokens()


def test_kv_of_a_row_is_what_it_does_not_find_and_half_its_output() -> None:
    job = job_of([[1, 1, 1, 5], [1, 1, 1, 6], [2]], 8)
    order = density(job)
    kv_tokens = dict(zip(order.rows.tolist(), order.units.kv_tokens.tolist()))
    assert kv_tokens[2] == 1 + 4
    assert sorted([kv_tokens[0], kv_tokens[1]]) == [1 + 4, 4 + 4]


def test_alike_rows_are_not_parted() -> None:
    prompts = [[1] * 50 + [row] for row in range(10, 30)]
    assert density(job_of(prompts, 5)).units.size.tolist() == [20]


def test_rows_of_opposite_kind_are_parted_when_that_is_cheap() -> None:
    """A short system prompt above rows that only read and rows that only write."""
    reading = [[9, 1] + [1] * 300 + [row] for row in range(10)]
    writing = [[9, 2, row] for row in range(10)]
    order = density(job_of(reading + writing, [1] * 10 + [500] * 10))
    assert sorted(order.rows[:10].tolist()) == list(range(10))
    assert len(order.units.size) > 1
    assert order.units.density[0] > order.units.mean_density > order.units.density[-1]


def test_rows_of_like_density_are_one_unit_and_start_as_they_came() -> None:
    """Sorted by length, rows that start together would also end together."""
    writing = [[row + 10] for row in range(12)]
    reading = [[row + 30] * 400 for row in range(4)]
    outputs = [200 + 40 * (row * 5 % 12) for row in range(12)] + [1] * 4
    order = density(job_of(writing + reading, outputs))
    assert order.units.size.tolist() == [4, 12]
    assert order.rows.tolist() == [12, 13, 14, 15, *range(12)]
    held = sum((1 + n / 2) * n for n in outputs[:12]) + 4 * 400.5
    assert order.units.prompt_share == pytest.approx((12 + 4 * 400) / held)
    num_steps = sum(outputs[:12]) + 4
    assert order.units.kv_per_slot == pytest.approx(held / num_steps)
