"""Steps that are skipped at once come to the same as steps made one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.clock import VirtualClock
from batchwright.exec.sim import LinearCost, SimExecutor, StepCost
from batchwright.kv.groups import KVGroup, blocks_per_sequence
from batchwright.plan.cost import CostModel, Hardware, RateCurve
from batchwright.plan.length_predictor import find_predictor
from batchwright.plan.order import find_order
from batchwright.plan.shape import AttentionShape, ModelShape, Product
from batchwright.plan.shared_keys import StepCosts
from batchwright.request import Request, SamplingParams, Task
from batchwright.sched.intake import SchedulerStats, Update
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import Sequence
from batchwright.step import EqualSteps
from batchwright.techniques import names

BLOCK_SIZE = 4
BUDGET = 24
END = 0  # the token that ends a row; also what a pretended row would draw if it did not look


@dataclass
class Outcome:
    """What two ways of running a job must agree on."""

    stats: SchedulerStats
    seconds: float = 0.0
    ends: list[tuple] = field(default_factory=list)  # (row, sample, steps, tokens, free blocks)
    states: list[tuple] = field(default_factory=list)  # after every round, by step
    num_rounds: int = 0


@dataclass(frozen=True)
class Row:
    prompt: tuple[int, ...]
    limit: int
    length: int | None  # None: it runs to its limit
    n: int = 1
    task: Task = Task.GENERATE


def families(rows: list[Row]) -> list[Sequence]:
    firsts, order = [], 0
    for index, row in enumerate(rows):
        generates = row.task is Task.GENERATE
        request = Request(
            id=str(index),
            prompt_token_ids=np.array(row.prompt, np.int32),
            params=SamplingParams(max_tokens=row.limit, n=row.n),
            task=row.task,
        )
        members = []
        for sample in range(row.n if generates else 1):
            members.append(
                Sequence(
                    request=request,
                    order=order,
                    sample_index=sample,
                    end_token_ids=(END,),
                    noise_key=index,
                    max_len=len(row.prompt) + row.limit * generates,
                    token_ids=request.prompt_token_ids,
                )
            )
            order += 1
        members[0].siblings = members[1:]
        firsts.append(members[0])
    return firsts


def run(
    rows: list[Row],
    windows: tuple[int | None, ...],
    *,
    num_blocks: int,
    max_num_seqs: int,
    order: str,
    cost: Callable[[], StepCost],
    at_once: bool,
    horizon: int = 10**6,
    lengths: str = "subtree",
    num_host_blocks: int = 0,
) -> Outcome:
    longest = max(len(row.prompt) + row.limit for row in rows)
    groups = [
        KVGroup(
            w,
            max(num_blocks, blocks_per_sequence(w, longest, BLOCK_SIZE, BUDGET)),
            num_host_blocks if windows == (None,) else 0,
        )
        for w in windows
    ]
    scheduler = Scheduler(
        groups,
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=BUDGET,
        max_model_len=longest,
        order=find_order(order),
        lengths=find_predictor(lengths),
    )
    clock = VirtualClock()
    executor = SimExecutor(clock, cost(), lambda new: rows[new.noise_key].length)
    outcome = Outcome(scheduler.stats)
    coming = families(rows)[::-1]

    def state() -> tuple:
        """Free blocks, and what is expected of rows."""
        books, forecast, expected = scheduler.books, scheduler._forecast, scheduler.expected
        free = [table.pool.num_free for table in books.tables]
        slots = books.slots.running
        places = books.slots.order[slots].tolist(), books.slots.expected_len[slots].tolist()
        waiting = sorted((s.order, s.expected_len, s.expected_output) for s in books.waiting.all())
        flags = forecast.is_made, forecast.num_late, expected.is_due, expected.num_ended
        return scheduler.stats.num_steps, free, places, waiting, flags

    def note(update: Update) -> None:
        for sequence in update.finished:
            key = (sequence.request.id, sequence.sample_index, scheduler.stats.num_steps)
            outcome.ends.append((*key, sequence.token_ids.tolist(), sequence.finish_reason))
        outcome.states.append(state())

    while True:
        while coming and scheduler.num_unfinished < horizon:
            scheduler.add(coming.pop())
        outcome.num_rounds += 1
        steps = scheduler.steps_until_change() if at_once else None
        if steps is not None:
            note(scheduler.skip(steps, executor.execute_equal(steps)))
        elif (step := scheduler.schedule()) is not None:
            note(scheduler.update(executor.execute(step)))
        else:
            break
        scheduler.check_integrity()
    assert not scheduler.num_unfinished
    outcome.seconds = clock.now()
    return outcome


def shape(windows: tuple[int | None, ...]) -> ModelShape:
    return ModelShape(
        hidden_size=8,
        vocab_size=50,
        num_layers=2,
        products=(Product(8, 24, 2), Product(8, 8, 6, share=0.5)),
        head=Product(8, 50),
        attention=tuple(AttentionShape(w, 1 + i, 2, 1, 4) for i, w in enumerate(windows)),
        num_params=1000,
    )


HARDWARE = Hardware(
    name="by hand",
    num_threads=1,
    layers=RateCurve((1, 4, 16), (1e3, 2e3, 5e3)),
    head=RateCurve((1, 8), (1e3, 4e3)),
    ceiling_flops_per_s=1e4,
    attention_flops_per_s=1e4,
    kv_bytes_per_s=2e4,
    memory_bytes_per_s=1e4,
    token_s=0.01,
    step_s=0.1,
    draw_s=0.02,
)


OVERLAPPED = replace(HARDWARE, overlap=0.6, kv_bytes_per_s=5e3, tile_rows=2)
COSTS = {
    "linear": lambda windows: LinearCost(1.0, 0.1, 0.01),
    "one after another": lambda windows: CostModel(shape(windows), HARDWARE),
    "overlapped": lambda windows: CostModel(shape(windows), OVERLAPPED),
    "shared": lambda windows: StepCosts(
        CostModel(shape(windows), OVERLAPPED, rows_per_load=2), BLOCK_SIZE
    ),
}


def both(
    rows: list[Row],
    windows: tuple[int | None, ...] = (None,),
    *,
    cost: Callable[[], StepCost] | None = None,
    **engine,
) -> Outcome:
    """Run a job both ways, compare, and return the outcome of skipping."""
    cost = cost or (lambda: CostModel(shape(windows), HARDWARE))
    one = run(rows, windows, cost=cost, at_once=False, **engine)
    many = run(rows, windows, cost=cost, at_once=True, **engine)
    assert many.stats == one.stats
    assert many.ends == one.ends
    assert many.seconds == pytest.approx(one.seconds, rel=1e-9)
    single = {line[0]: line for line in one.states}
    assert [single[line[0]] for line in many.states] == many.states
    return many


PREDICTORS = [name for name in names("plan.lengths") if name != "self_report"]


@st.composite
def jobs(draw) -> list[Row]:
    stems = [tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=30))) for _ in range(3)]
    rows = []
    for index in range(draw(st.integers(2, 16))):
        stem = draw(st.sampled_from(stems))
        prompt = stem[: draw(st.integers(1, len(stem)))]
        prompt += (10 + index,) * draw(st.integers(0, 9))
        rows.append(
            Row(
                prompt,
                limit=draw(st.integers(1, 60)),
                length=draw(st.none() | st.integers(1, 70)),
                n=draw(st.sampled_from([1, 1, 1, 2, 4])),
                task=draw(st.sampled_from([Task.GENERATE] * 5 + [Task.EMBED])),
            )
        )
    return rows


@settings(max_examples=60, deadline=None)
@given(
    rows=jobs(),
    windows=st.sampled_from([(None,), (None,), (7,), (16,), (None, 9), (None, 5, 16)]),
    num_blocks=st.sampled_from([1, 12, 16, 20, 24, 30, 500]),
    max_num_seqs=st.integers(2, 8),
    order=st.sampled_from(names("plan.orders")),
    horizon=st.sampled_from([3, 6, 10**6]),
    cost=st.sampled_from(sorted(COSTS)),
    lengths=st.sampled_from([*PREDICTORS, "subtree", "subtree"]),
    num_host_blocks=st.sampled_from([0, 0, 4, 60]),
)
def test_steps_at_once_are_steps_one_by_one(
    rows, windows, num_blocks, max_num_seqs, order, horizon, cost, lengths, num_host_blocks
) -> None:
    both(
        rows,
        windows,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        order=order,
        horizon=horizon,
        cost=lambda: COSTS[cost](windows),
        lengths=lengths,
        num_host_blocks=num_host_blocks,
    )


def test_a_job_of_equal_rows_takes_few_rounds() -> None:
    rows = [Row((index + 1,) * 8, 100, None) for index in range(6)]
    outcome = both(rows, num_blocks=500, max_num_seqs=3, order="fcfs")
    assert outcome.stats.num_steps == 200
    assert outcome.num_rounds <= 6  # twice: prompts, decoding; and one to see that all is done


def test_rows_that_end_apart_take_two_rounds_each() -> None:
    rows = [Row((index + 1,) * 8, 90, 10 + 7 * index) for index in range(10)]
    outcome = both(rows, num_blocks=500, max_num_seqs=3, order="fcfs")
    assert outcome.num_rounds <= 2 * len(rows) + 2 < outcome.stats.num_steps / 4


def test_where_blocks_run_out_in_the_middle_rows_are_preempted_at_the_same_step() -> None:
    rows = [Row((index + 1,) * 8, 60, 5) for index in range(12)]  # all are taken to be like these
    rows += [Row((index + 20,) * 8, 60, None) for index in range(12)]
    outcome = both(rows, num_blocks=30, max_num_seqs=4, order="fcfs")
    assert outcome.stats.num_preemptions > 0
    assert outcome.num_rounds < outcome.stats.num_steps / 3


def test_a_row_starts_as_soon_as_it_fits_to_its_end() -> None:
    """Eighteen blocks, of which the first row will hold ten: the second, which goes on for longer,
    must wait until it will have no more than eight when the first leaves."""
    rows = [Row((1,) * 4, 36, None), Row((2,) * 8, 60, None)]
    outcome = both(rows, num_blocks=18, max_num_seqs=2, order="fcfs")
    assert 60 < outcome.stats.num_steps < 60 + 36, "neither at once nor when the first has ended"
    assert outcome.stats.num_preemptions == 0
    assert outcome.num_rounds <= 6


def test_rows_that_outgrow_what_is_expected_take_few_rounds() -> None:
    """Ten short rows have ended, then twelve run to twelve times as much; others wait."""
    rows = [Row((index + 1,) * 8, 60, 5) for index in range(10)]
    rows += [Row((index + 20,) * 8, 60, None) for index in range(12)]
    outcome = both(rows, num_blocks=30, max_num_seqs=6, order="fcfs", lengths="history")
    expected = {length for _, _, (_, lengths), *_ in outcome.states for length in lengths}
    assert len(expected) > 4, "what is expected of them grew"
    assert outcome.num_rounds < outcome.stats.num_steps / 2


@pytest.mark.parametrize("lengths", PREDICTORS)
def test_while_memory_is_full_a_queue_costs_no_rounds(lengths) -> None:
    rows = [Row((index + 1,) * 8, 80, 30 + 5 * (index % 11)) for index in range(40)]
    outcome = both(rows, num_blocks=66, max_num_seqs=24, order="fcfs", lengths=lengths)
    assert outcome.num_rounds < outcome.stats.num_steps / 3


@pytest.mark.parametrize("lengths", PREDICTORS)
def test_of_two_ends_each_waits_for_itself(lengths) -> None:
    """Rows that write find no memory until others end; rows that read pass by them."""
    rows = [Row((index + 1,) * 8, 90, 60 + 5 * (index % 7)) for index in range(16)]
    rows += [Row((index + 40,) * 40, 4, None) for index in range(40)]
    outcome = both(rows, num_blocks=70, max_num_seqs=12, order="density", lengths=lengths)
    assert outcome.num_rounds < outcome.stats.num_steps


def test_cached_blocks_are_given_up_at_the_same_step() -> None:
    """Four rows of one prefix run, and its blocks wait for a fifth that has no room."""
    rows = [Row((1,) * 24 + (10 + index,) * 4, 40, None) for index in range(5)]
    rows += [Row((2,) * 40, 30, None)] * 2
    outcome = both(rows, num_blocks=24, max_num_seqs=5, order="fcfs")
    assert outcome.num_rounds < outcome.stats.num_steps / 2


def test_samples_copy_their_last_block_when_they_part() -> None:
    rows = [Row((1,) * 10, 50, 33, n=4)]
    outcome = both(rows, num_blocks=500, max_num_seqs=4, order="fcfs")
    assert outcome.num_rounds <= 5


def scheduler_of(rows: list[Row]) -> Scheduler:
    scheduler = Scheduler(
        [KVGroup(None, 100)],
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        max_num_batched_tokens=BUDGET,
        max_model_len=200,
    )
    for sequence in families(rows):
        scheduler.add(sequence)
    return scheduler


def advance(scheduler: Scheduler, executor: SimExecutor) -> None:
    step = scheduler.schedule()
    assert step is not None
    scheduler.update(executor.execute(step))


def test_it_says_which_rows_from_where_and_how_long() -> None:
    scheduler = scheduler_of([Row((1,) * 5, 12, None), Row((2,) * 9, 30, None)])
    executor = SimExecutor(VirtualClock())
    assert scheduler.steps_until_change() is None, "nothing runs yet"
    advance(scheduler, executor)
    steps = scheduler.steps_until_change()
    assert isinstance(steps, EqualSteps)
    assert steps.positions.tolist() == [5, 9]
    assert steps.num_steps == 11  # the first token is drawn, the twelfth is the last


def test_a_row_that_could_start_is_a_change() -> None:
    scheduler = scheduler_of([Row((1,) * 5, 12, None)])
    advance(scheduler, SimExecutor(VirtualClock()))
    assert scheduler.steps_until_change() is not None
    scheduler.add(families([Row((2,) * 5, 12, None)])[0])
    assert scheduler.steps_until_change() is None


def test_a_result_in_flight_is_not_skipped_over() -> None:
    scheduler = scheduler_of([Row((1,) * 5, 12, None)])
    scheduler.schedule()
    with pytest.raises(AssertionError, match="outstanding"):
        scheduler.steps_until_change()
