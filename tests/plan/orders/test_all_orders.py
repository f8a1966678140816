"""What holds for every file of plan/orders."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.plan.order import JobFacts, Order, OrderFunction
from batchwright.techniques import find, names
from tests.plan.tries import job_of, num_computed

ORDERS = names("plan.orders")
KEEP_SUBTREES = ["prefix_dfs"]
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), max_size=14)


def function(name: str) -> OrderFunction:
    return getattr(find("plan.orders", name), name)


def test_the_known_ones_are_there() -> None:
    assert {"fcfs", "prefix_dfs", "longest_first", "groups", "density"} <= set(ORDERS)


@pytest.mark.parametrize("name", ORDERS)
def test_takes_facts_and_gives_an_order(name: str) -> None:
    signature = inspect.signature(function(name), eval_str=True)
    assert [p.annotation for p in signature.parameters.values()] == [JobFacts]
    assert signature.return_annotation is Order
    assert function(name).__doc__


@pytest.mark.parametrize("name", ORDERS)
@settings(max_examples=60)
@given(data=st.data(), prompts=PROMPTS, block_size=st.sampled_from([1, 2]))
def test_every_row_once_and_pure(name: str, data, prompts, block_size) -> None:
    num_rows = len(prompts)
    outputs = data.draw(st.lists(st.integers(0, 9), min_size=num_rows, max_size=num_rows))
    continues = data.draw(st.none() | st.integers(0, num_rows - 1)) if num_rows else None

    def order() -> Order:
        job = job_of(prompts, outputs, block_size=block_size, continues=continues)
        return function(name)(job)

    first, second = order(), order()
    assert sorted(first.rows.tolist()) == list(range(num_rows))
    assert first.rows.tolist() == second.rows.tolist()
    assert first.rows.dtype == np.int32
    if first.units is not None:
        assert first.units.size.sum() == num_rows
        assert (first.units.size > 0).all()
        assert (np.diff(first.units.density) <= 0).all()
        assert len(first.units.kv_tokens) == num_rows


@pytest.mark.parametrize("name", KEEP_SUBTREES)
@settings(max_examples=100)
@given(prompts=PROMPTS)
def test_computes_every_distinct_token_once(name: str, prompts: list[list[int]]) -> None:
    job = job_of(prompts)
    assert (
        num_computed(prompts, function(name)(job).rows.tolist()) == job.tree.num_distinct_tokens()
    )


def test_prefix_dfs_takes_subtrees_as_they_come_and_goes_on_where_it_was() -> None:
    prompts = [[5, 1], [3, 1], [5, 2], [3], [3, 2], [5]]
    assert function("prefix_dfs")(job_of(prompts)).rows.tolist() == [5, 0, 2, 3, 1, 4]
    rows = function("prefix_dfs")(job_of(prompts, continues=4)).rows.tolist()
    assert rows == [3, 4, 1, 5, 0, 2]


def test_longest_first_is_depth_first_among_equals() -> None:
    prompts = [[5, 1], [3, 1], [5, 2], [3, 2]]
    assert function("longest_first")(job_of(prompts, [1, 9, 1, 1])).rows.tolist() == [1, 0, 2, 3]


def test_fcfs_makes_no_tree() -> None:
    job = job_of([[1], [2]])
    function("fcfs")(job)
    assert "tree" not in vars(job)
