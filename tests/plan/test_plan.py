"""Plan as a pull source: when rows are ordered, and when a block is used next."""

from __future__ import annotations

import random

import numpy as np
import pytest

from batchwright.plan.order import JobFacts, Order, find_order
from batchwright.plan.orders.prefix_dfs import prefix_dfs
from batchwright.plan.plan import NOT_SOON, Plan, job_facts
from batchwright.request import FinishReason, Request, SamplingParams
from batchwright.sequence import Sequence
from batchwright.techniques import names

BLOCK_SIZE = 4
ORDERS = names("plan.orders")


def waiting_row(index: int, nodes: list[int], num_tokens: int = 5, n: int = 1) -> Sequence:
    request = Request(
        id=f"r{index}",
        prompt_token_ids=np.arange(4 * len(nodes) + 1, dtype=np.int32),
        params=SamplingParams(max_tokens=num_tokens, n=n),
    )
    members = [
        Sequence(
            request=request,
            order=10 * index + sample,
            sample_index=sample,
            end_token_ids=(),
            noise_key=index,
            max_len=request.prompt_token_ids.size + num_tokens,
            token_ids=request.prompt_token_ids,
            nodes=np.array(nodes, np.int32),
        )
        for sample in range(n)
    ]
    members[0].siblings = members[1:]
    return members[0]


def plan_of(order: str, rows: list[Sequence]) -> Plan:
    plan = Plan(find_order(order), block_size=BLOCK_SIZE, kv_tokens=10_000)
    for row in rows:
        plan.append(row)
    return plan


def drain(plan: Plan) -> list[Sequence]:
    started = []
    while (sequence := plan.next_admission()) is not None:
        sequence.finish_reason = FinishReason.LENGTH  # so that no memory stays in use
        started.append(sequence)
    return started


@pytest.mark.parametrize("order", ORDERS)
def test_every_row_starts_once_whenever_it_comes(order: str) -> None:
    draw = random.Random(order)
    rows = [
        waiting_row(i, [i % 5, 10 + i % 20], draw.randint(1, 50), draw.choice([1, 3]))
        for i in range(300)
    ]
    plan, started, unread = plan_of(order, []), [], list(rows)
    while unread or len(started) < len(rows):
        if unread and draw.random() < 0.6:
            plan.append(unread.pop(0))
        elif (sequence := plan.next_admission()) is not None:
            sequence.finish_reason = FinishReason.LENGTH
            started.append(sequence)
    assert plan.next_admission() is None
    assert sorted(map(id, started)) == sorted(map(id, rows))


@pytest.mark.parametrize("order", ORDERS)
def test_cancelled_rows_do_not_start(order: str) -> None:
    rows = [waiting_row(i, [i % 2]) for i in range(8)]
    plan = plan_of(order, rows)
    first = plan.next_admission()
    for row in rows[1:6]:
        if row is not first:
            row.finish_reason = FinishReason.CANCELLED
    left = [row for row in rows if row.finish_reason is None and row is not first]
    assert {id(row) for row in drain(plan)} == {id(row) for row in left}


@pytest.mark.parametrize("order", ORDERS)
def test_rows_that_come_after_cancelled_ones_start(order: str) -> None:
    rows = [waiting_row(i, [i]) for i in range(4)]
    plan = plan_of(order, rows[:3])
    first = plan.next_admission()
    assert first is not None
    for row in rows[:3]:
        row.finish_reason = FinishReason.CANCELLED
    plan.append(rows[3])
    assert plan.next_admission() is rows[3]


def test_places_in_the_job_follow_the_order() -> None:
    """They decide what is preempted; the numbers that the rows came with are kept."""
    rows = [waiting_row(0, [1, 2]), waiting_row(1, [5], n=3), waiting_row(2, [1, 3], n=2)]
    numbers = {member.order for row in rows for member in (row, *row.siblings)}
    started = drain(plan_of("prefix_dfs", rows))
    assert started == [rows[0], rows[2], rows[1]]
    orders = [member.order for row in started for member in (row, *row.siblings)]
    assert orders == sorted(orders) and set(orders) == numbers


def test_a_subtree_that_was_begun_is_finished_when_rows_come() -> None:
    rows = [waiting_row(0, [1, 2]), waiting_row(1, [9, 5]), waiting_row(2, [1, 3])]
    plan = plan_of("prefix_dfs", rows)
    assert plan.next_admission() is rows[0]
    late = [waiting_row(3, [9, 6]), waiting_row(4, [1, 4])]
    for row in late:
        plan.append(row)
    assert drain(plan) == [rows[2], late[1], rows[1], late[0]]


def test_replanning_is_rare() -> None:
    """Rows that come one by one while thousands wait are not ordered each time."""
    num_calls = 0

    def counting(job: JobFacts) -> Order:
        nonlocal num_calls
        num_calls += 1
        return prefix_dfs(job)

    plan = Plan(counting, block_size=BLOCK_SIZE)
    rows = [waiting_row(i, [i % 50, 100 + i % 500]) for i in range(4000)]
    for row in rows[:2000]:
        plan.append(row)
    for row in rows[2000:]:
        plan.next_admission()
        plan.append(row)
    assert len(drain(plan)) == 2000
    assert num_calls < 40


@pytest.mark.parametrize("order", ["fcfs", "prefix_dfs", "longest_first", "groups"])
def test_next_use_is_the_place_of_the_next_row_that_waits(order: str) -> None:
    draw = random.Random(order)
    rows = [
        waiting_row(i, [draw.randrange(4), 10 + draw.randrange(9)], draw.randint(1, 50))
        for i in range(60)
    ]
    coming = drain(plan_of(order, rows))
    for row in rows:
        row.finish_reason = None
    plan = plan_of(order, rows)
    nodes = np.arange(25, dtype=np.int32)
    for num_started in range(len(rows)):
        assert plan.next_admission() is coming[num_started]
        if draw.random() < 0.3:
            left = coming[num_started + 1 :]
            places = [[p for p, row in enumerate(left) if node in row.nodes] for node in nodes]
            expected = [min(of_node, default=NOT_SOON) for of_node in places]
            soon = plan.next_use(nodes)
            assert [use if use < NOT_SOON / 2 else NOT_SOON for use in soon.tolist()] == expected


def test_facts_count_samples_and_whole_blocks() -> None:
    facts = job_facts([waiting_row(0, [3, 4], 5, n=3), waiting_row(1, [3], 7)], BLOCK_SIZE)
    assert facts.num_prompt_tokens.tolist() == [9, 5]
    assert facts.num_output_tokens.tolist() == [15, 7]
    assert facts.tree.depth[facts.tree.node_of_row].tolist() == [8, 4]
