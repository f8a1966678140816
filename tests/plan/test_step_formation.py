"""Hybrid batches under a token budget: golden values of Sarathi and lifetimes of BatchLLM's groups.

SARATHI (arXiv:2308.16369), Sarathi-Serve (arXiv:2403.02310), BatchLLM (arXiv:2412.03594).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.clock import VirtualClock
from batchwright.exec.sim import SimExecutor
from batchwright.kv.groups import KVGroup
from batchwright.plan.cost import CostModel, Hardware, RateCurve
from batchwright.plan.model_shapes import find_model_shape
from batchwright.plan.order import find_order
from batchwright.request import Request, SamplingParams
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import Sequence
from batchwright.step import Step
from batchwright.techniques import names

BLOCK_SIZE = 4


def row(order: int, prompt: list[int], num_output: int) -> Sequence:
    ids = np.array(prompt, np.int32)
    request = Request(id=str(order), prompt_token_ids=ids, params=SamplingParams())
    return Sequence(
        request=request,
        order=order,
        sample_index=0,
        end_token_ids=(),
        noise_key=order,
        max_len=len(prompt) + num_output,
        token_ids=ids,
    )


@dataclass
class Run:
    """Steps of a run made one by one, and what was resident after each."""

    scheduler: Scheduler
    clock: VirtualClock = field(default_factory=VirtualClock)
    steps: list[Step] = field(default_factory=list)
    decoding: list[set[int]] = field(default_factory=list)  # rows that had drawn before each Step
    computing: list[set[int]] = field(default_factory=list)  # rows that compute in it
    unfinished: list[set[int]] = field(default_factory=list)  # rows that run after it
    resident: list[np.ndarray] = field(default_factory=list)  # block ids held after it


def run(
    rows: list[Sequence], *, budget: int, num_seqs: int, num_blocks: int = 10_000, **more
) -> Run:
    cost, order = more.pop("cost", None), more.pop("order", "fcfs")
    done = Run(
        Scheduler(
            [KVGroup(None, num_blocks)],
            block_size=BLOCK_SIZE,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max(one.max_len for one in rows),
            order=find_order(order),
            **more,
        )
    )
    scheduler, executor = done.scheduler, SimExecutor(done.clock, cost)
    for one in rows:
        scheduler.add(one)
    while scheduler.num_unfinished:
        slots = scheduler.books.slots
        running = slots.running
        drawn = running[slots.num_tokens[running] > slots.num_prompt[running]]
        done.decoding.append({scheduler.books.occupant(slot).noise_key for slot in drawn})
        step = scheduler.schedule()
        assert step is not None
        done.steps.append(step)
        occupants = [scheduler.books.occupant(slot) for slot in step.slots.tolist()]
        done.computing.append({occupant.noise_key for occupant in occupants})
        done.resident.append(np.flatnonzero(scheduler.books.tables[0].pool.ref_counts))
        scheduler.update(executor.execute(step))
        scheduler.check_integrity()
        left = scheduler.books.slots.running
        done.unfinished.append({scheduler.books.occupant(slot).noise_key for slot in left})
    return done


@pytest.mark.parametrize(("prompt", "chunk", "output"), [(100, 16, 7), (96, 16, 1), (5, 16, 3)])
def test_steps_of_a_row_alone(prompt: int, chunk: int, output: int) -> None:
    """ceil(P / C) chunks; the last one draws the first of D tokens, and D - 1 Steps follow."""
    done = run([row(0, list(range(prompt)), output)], budget=chunk, num_seqs=4)
    assert len(done.steps) == -(-prompt // chunk) + output - 1


JOBS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(
    shapes=JOBS,
    budget=st.integers(4, 24),
    order=st.sampled_from(names("plan.orders")),
    num_blocks=st.sampled_from([16, 24, 400]),
    sharing=st.booleans(),
)
def test_every_step_is_within_its_limits_and_stalls_no_decode(
    shapes, budget, order, num_blocks, sharing
) -> None:
    """Tokens within the budget, blocks within the pool, every decode in every Step that preempts
    nobody, and prompt tokens computed: no fewer than are distinct, all of them without sharing."""
    prompts = [[kind] * 12 + [10 + i] * length for i, (length, _, kind) in enumerate(shapes)]
    rows = [row(i, prompts[i], output) for i, (_, output, _) in enumerate(shapes)]
    done = run(
        rows,
        budget=budget,
        num_seqs=4,
        num_blocks=num_blocks,
        order=order,
        prefix_sharing=sharing,
    )
    stats = done.scheduler.stats
    for step, before, computes, held in zip(
        done.steps, done.decoding, done.computing, done.resident, strict=True
    ):
        assert step.num_tokens <= budget
        assert len(held) <= num_blocks
        if not stats.num_preemptions:
            assert before <= computes
    assert done.scheduler.books.tables[0].pool.num_free == num_blocks
    logical = sum(len(prompt) for prompt in prompts)
    kinds = {kind for _, _, kind in shapes}
    distinct = 12 * len(kinds) + sum(length for length, _, _ in shapes)
    computed = stats.work.num_prompt_tokens
    assert computed >= distinct
    if not sharing and not stats.num_preemptions:
        assert computed == logical


def steps_saved(ratio: float, *, chunk: int = 64, batch: int = 9, length: int = 180) -> float:
    """Steps without mixing, chunks first and then decodes together, against ours; P:D as given."""
    prompt = round(length * ratio / (1 + ratio))
    output = length - prompt
    rows = [row(i, [i + 1] * prompt, output) for i in range(6 * batch)]
    done = run(rows, budget=chunk, num_seqs=batch)
    apart = 6 * (-(-batch * prompt // chunk) + output - 1)
    return apart / len(done.steps)


def test_mixing_gains_most_where_the_decodes_just_fit_beside_the_chunks() -> None:
    """The peak over P:D is within one cell of the grid from C / (B - 1), which is 8."""
    grid = [1, 2, 3, 4, 5, 6.5, 8, 10, 13, 17]
    gains = [steps_saved(ratio) for ratio in grid]
    best = int(np.argmax(gains))
    assert abs(best - grid.index(8)) <= 1
    assert gains[best] > 1.15 * gains[0] and gains[best] > 1.15 * gains[-1]


def test_a_perfect_mix_has_no_step_of_decodes_only() -> None:
    """Between the first prompts and the last, all Steps are full."""
    chunk, batch = 64, 9
    rows = [row(i, [i + 1] * 158, 22) for i in range(60)]
    done = run(rows, budget=chunk, num_seqs=batch)
    sizes = [step.num_tokens for step in done.steps]
    steady = sizes[30:-40]
    assert len(steady) > 60
    assert sum(size == chunk for size in steady) > 0.95 * len(steady)


LLAMA = find_model_shape("Llama-3-8B")
TILED = Hardware(
    name="by hand",
    num_threads=1,
    layers=RateCurve((128.0,), (1e14,)),
    head=RateCurve((128.0,), (1e14,)),
    ceiling_flops_per_s=1e14,
    attention_flops_per_s=1e14,
    kv_bytes_per_s=1e12,
    memory_bytes_per_s=1e12,
    tile_rows=128,
)


def test_a_token_more_than_a_tile_never_pays() -> None:
    rows = [(i, [i + 1] * 500, 30) for i in range(12)]
    seconds = {}
    for budget in (256, 257):
        cost = CostModel(LLAMA, TILED, 2, 2)
        done = run([row(*one) for one in rows], budget=budget, num_seqs=8, cost=cost)
        seconds[budget] = done.clock.now()
    assert seconds[256] <= seconds[257]


def test_a_prefix_is_resident_from_its_first_user_to_its_last_and_no_longer() -> None:
    """Groups of four rows: never more prefixes at once than groups that run, and the pool empty."""
    num_groups, prefix_blocks = 6, 10
    rows = [
        row(4 * g + m, [g + 1] * (prefix_blocks * BLOCK_SIZE) + [100 + 4 * g + m] * 3, 3 + 2 * m)
        for g in range(num_groups)
        for m in range(4)
    ]
    done = run(rows, budget=64, num_seqs=6, order="groups")
    first_prefix: dict[int, deque[int]] = {}
    for number, (step, held) in enumerate(zip(done.steps, done.resident, strict=True)):
        running = done.computing[number] | done.unfinished[number]
        groups = {one // 4 for one in running}
        own_blocks = sum(-(-(3 + 9) // BLOCK_SIZE) + 1 for _ in running)
        assert len(held) <= len(groups) * prefix_blocks + own_blocks, number
        for group in groups:
            first_prefix.setdefault(group, deque()).append(number)
        assert step.num_tokens <= 64
    for numbers in first_prefix.values():  # a group runs in one stretch
        assert list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    assert done.scheduler.stats.work.num_prompt_tokens == num_groups * (40 + 4 * 3)
    assert done.scheduler.books.tables[0].pool.num_free == 10_000


def test_few_slots_spread_prompts_over_the_steps_that_there_are() -> None:
    """Forty rows that read beside eight that write, in eight slots and memory for hundreds: about
    110 prompt tokens a step, where memory that is full all the time would allow 7,000."""
    reading = [row(i, [i + 1] * 300, 2) for i in range(40)]
    writing = [row(40 + i, [100 + i] * 4, 100) for i in range(8)]
    done = run(reading + writing, budget=2048, num_seqs=8, order="density")
    sizes = [step.num_tokens for step in done.steps[1:61]]  # neither the first nor the last rows
    assert max(sizes) <= 128 + 8
    assert sum(size > 8 for size in sizes) > 0.7 * len(sizes)
