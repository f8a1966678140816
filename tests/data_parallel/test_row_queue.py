"""Which replica gets which rows: prefixes kept together, work spread, nothing lost."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest

from batchwright.data_parallel.row_queue import OUTPUT_WEIGHT, Row, RowQueue, expected_output
from batchwright.plan.orders.longest_first import longest_first
from batchwright.request import Request, SamplingParams, Task

BLOCK = 4


def row(arrival: int, prompt: list[int], output: float = 1.0, **fields) -> Row:
    request = Request(id=f"r{arrival}", prompt_token_ids=np.array(prompt, np.int32), **fields)
    return Row(request, arrival, output)


def queue_of(rows: list[Row], num_replicas: int = 2, **options) -> RowQueue:
    queue = RowQueue(num_replicas, block_size=BLOCK, **options)
    for one in rows:
        queue.add(one)
    return queue


def deal(queue: RowQueue, num_replicas: int = 2, chunk: int = 1) -> list[list[int]]:
    """Arrivals of the rows of each replica, taken in turns."""
    taken: list[list[int]] = [[] for _ in range(num_replicas)]
    while len(queue):
        for number in range(num_replicas):
            for _ in range(chunk):
                one = queue.take(number, {})
                if one is not None:
                    taken[number].append(one.arrival)
    return taken


def groups(num_groups: int, size: int, shared: int = 8) -> list[Row]:
    """Rows of some groups in turns; those of one group share a prefix."""
    return [row(i, [i % num_groups] * shared + [100 + i] * 4) for i in range(num_groups * size)]


def test_rows_that_share_a_prefix_go_to_one_replica():
    taken = deal(queue_of(groups(4, 6)))
    assert [len(part) for part in taken] == [12, 12]
    assert [len({arrival % 4 for arrival in part}) for part in taken] == [2, 2]
    assert sorted(taken[0] + taken[1]) == list(range(24))


def test_rows_that_share_nothing_keep_their_order():
    taken = deal(queue_of([row(i, [i] * 5) for i in range(10)]))
    assert taken == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_a_group_larger_than_a_span_is_cut():
    taken = deal(queue_of(groups(1, 20)))
    assert [len(part) for part in taken] == [10, 10]


def test_a_cut_is_moved_to_where_it_costs_least():
    # nine of one prefix of 40 tokens, seven of another: an even cut would be within the first
    rows = [row(i, [7] * 40 + [50 + i] * 4) for i in range(9)]
    rows += [row(i, [8] * 40 + [50 + i] * 4) for i in range(9, 16)]
    queue = queue_of(rows)
    queue.take(0, {})
    assert [len(span) for span in queue._spans.values()] == [8, 7]


def test_spans_are_even_by_work_not_by_rows():
    rows = [row(i, [i] * 4, output=30.0 if i < 4 else 1.0) for i in range(20)]
    queue = queue_of(rows)
    queue.take(0, {})
    assert [len(span) for span in queue._spans.values()] == [2, 17]  # three long ones in the first


def test_a_replica_that_has_much_gets_less():
    queue = queue_of([row(i, [i] * 4, output=0.0) for i in range(10)])
    queue.take(1, {0: 24.0, 1: 0.0})
    assert [len(span) for span in queue._spans.values()] == [2, 7]


def test_who_has_nothing_left_takes_half_of_the_largest_span():
    queue = queue_of([row(i, [i] * 4) for i in range(16)])
    first = [queue.take(0, {}).arrival for _ in range(9)]
    assert first == [0, 1, 2, 3, 4, 5, 6, 7, 12]  # then the second half of the other's
    assert [queue.take(1, {}).arrival for _ in range(4)] == [8, 9, 10, 11]
    assert queue.take(1, {}).arrival in (13, 14, 15)


def test_all_rows_go_to_a_replica_that_asks_alone():
    queue = queue_of(groups(3, 5), num_replicas=3)
    taken = [queue.take(2, {}).arrival for _ in range(15)]
    assert sorted(taken) == list(range(15)) and queue.take(2, {}) is None and not len(queue)


def test_rows_that_come_later_join_those_of_their_prefix():
    queue = queue_of(groups(2, 8))
    for i in range(16, 24):  # a good part of those that wait, so that all are ordered again
        queue.add(row(i, [i % 2] * 8 + [100 + i] * 4))
    taken = deal(queue)
    assert [{arrival % 2 for arrival in part} for part in taken] == [{0}, {1}]


def test_a_few_new_rows_wait_until_others_are_gone():
    queue = queue_of([row(i, [i] * 4) for i in range(20)])
    queue.take(0, {})
    queue.add(row(20, [20] * 4))
    assert "r20" in queue and all(r.request.id != "r20" for s in queue._spans.values() for r in s)
    taken = [queue.take(number, {}).arrival for number in (0, 1) * 10]
    assert sorted(taken) == list(range(1, 21)) and not len(queue)


def test_a_removed_row_is_not_given_out():
    queue = queue_of([row(i, [i] * 4) for i in range(6)])
    queue.take(0, {})
    assert queue.remove("r1").arrival == 1
    assert sorted(functools.reduce(operator.iadd, deal(queue), [])) == [2, 3, 4, 5]


def test_rows_of_a_dropped_replica_go_to_the_others():
    queue = queue_of([row(i, [i] * 4) for i in range(9)], num_replicas=3)
    given = [queue.take(number, {}) for number in range(3)]
    queue.drop_replica(1)
    queue.add_again([given[1]])
    taken = [queue.take(number, {}).arrival for number in (0, 2, 0, 2, 0, 2, 0)]
    assert sorted(taken) == sorted({*range(9)} - {given[0].arrival, given[2].arrival})


def test_longest_first_is_dealt_in_turns():
    rows = [row(i, [i] * 4, output=float(i)) for i in range(6)]
    queue = queue_of(rows, order=longest_first, in_turns=True)
    assert deal(queue) == [[5, 3, 1], [4, 2, 0]]


def test_namespaces_share_nothing():
    rows = [row(i, [1] * 8, namespace=str(i % 2)) for i in range(8)]
    assert [{a % 2 for a in part} for part in deal(queue_of(rows))] == [{0}, {1}]


def test_clear_forgets_all():
    queue = queue_of(groups(2, 3))
    queue.take(0, {})
    queue.clear()
    assert queue.take(0, {}) is None
    queue.add(row(99, [1]))
    assert queue.take(1, {}).arrival == 99


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 7])
def test_every_row_is_given_out_once_whatever_happens(num_replicas):
    rng = np.random.default_rng(num_replicas)
    queue, taken, removed, alive = RowQueue(num_replicas, block_size=BLOCK), [], [], num_replicas
    for arrival in range(300):
        prompt = [*rng.integers(0, 2, 4).repeat(4).tolist(), arrival]
        queue.add(row(arrival, prompt, output=float(rng.integers(0, 50))))
        for _ in range(int(rng.integers(0, 3))):
            loads = {n: float(rng.integers(0, 500)) for n in range(alive)}
            if (one := queue.take(int(rng.integers(alive)), loads)) is not None:
                taken.append(one)
        if rng.random() < 0.05 and len(queue):
            removed.append(queue.remove(next(iter(queue.rows)).request.id))
        if rng.random() < 0.01 and alive > 1:
            alive -= 1
            queue.drop_replica(alive)
            again = taken[-3:]
            del taken[-3:]
            queue.add_again(again)
    while (one := queue.take(int(rng.integers(alive)), {})) is not None:
        taken.append(one)
    assert sorted(r.arrival for r in taken + removed) == list(range(300))


def test_expected_output():
    def request(**fields) -> Request:
        return Request(id="a", prompt_token_ids=np.zeros(10, np.int32), **fields)

    assert expected_output(request(params=SamplingParams(max_tokens=40)), 100, 0.5) == 20
    assert expected_output(request(params=SamplingParams(max_tokens=40, n=3)), 100, 1.0) == 120
    assert expected_output(request(params=SamplingParams(max_tokens=400)), 100, 1.0) == 90
    forced = SamplingParams(max_tokens=40, ignore_eos=True)
    assert expected_output(request(params=forced), 100, 0.1) == 40
    assert expected_output(request(task=Task.EMBED), 100, 1.0) == 0
    assert row(0, [1, 2], output=3.0).work == OUTPUT_WEIGHT * 3.0
