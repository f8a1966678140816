"""SimExecutor under the real scheduler: forced lengths, virtual time, look-ahead."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from batchwright.clock import VirtualClock
from batchwright.exec.sim import ORDINARY_TOKEN, LinearCost, SimExecutor
from batchwright.kv.groups import KVGroup
from batchwright.request import FinishReason, Request, SamplingParams
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import Sequence
from batchwright.step import NewSequence, Step
from tests.sched.harness import start_what_fits_now

END_TOKEN = 9
MAX_TOKENS = 30
CROWDED = 16  # blocks


def sequence(order: int, num_prompt: int, *, ends: tuple[int, ...] = (END_TOKEN,)) -> Sequence:
    prompt = np.arange(num_prompt, dtype=np.int32) + 100 * (order % 3)
    request = Request(
        id=str(order), prompt_token_ids=prompt, params=SamplingParams(max_tokens=MAX_TOKENS)
    )
    return Sequence(
        request=request,
        order=order,
        sample_index=0,
        end_token_ids=ends,
        noise_key=order,
        max_len=num_prompt + MAX_TOKENS,
        token_ids=prompt,
    )


def true_length(new: NewSequence) -> int | None:
    """From 1 to 36, so that some run into their limit of 30; some have no end of their own."""
    return None if new.noise_key % 7 == 3 else 1 + new.noise_key * 11 % 36


def simulate(
    sequences: list[Sequence],
    *,
    look_ahead: int = 0,
    num_blocks: int = 1000,
    cost: LinearCost | None = None,
    output_length=true_length,
) -> tuple[list[Step], Scheduler, VirtualClock]:
    clock = VirtualClock()
    scheduler = Scheduler(
        [KVGroup(None, num_blocks)],
        block_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        max_model_len=64,
    )
    if num_blocks == CROWDED:
        start_what_fits_now(scheduler)
    executor = SimExecutor(clock, cost, output_length)
    for one in sequences:
        scheduler.add(one)
    steps, outstanding = [], deque()
    while scheduler.num_unfinished:
        while len(outstanding) <= look_ahead and (step := scheduler.schedule()) is not None:
            steps.append(step)
            outstanding.append(executor.execute(step))
        scheduler.update(outstanding.popleft())
        scheduler.check_integrity()
    executor.close()
    return steps, scheduler, clock


def job() -> list[Sequence]:
    return [sequence(order, 1 + order * 5 % 23) for order in range(40)]


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("num_blocks", [1000, CROWDED], ids=["roomy", "crowded"])
def test_sequences_end_at_their_true_length(look_ahead: int, num_blocks: int) -> None:
    sequences = job()
    _, scheduler, _ = simulate(sequences, look_ahead=look_ahead, num_blocks=num_blocks)
    assert (scheduler.stats.num_preemptions > 0) == (num_blocks == CROWDED)
    for one in sequences:
        length = true_length(NewSequence(0, one.token_ids, 0, one.request.params, one.order, 0, ()))
        output = one.token_ids[one.num_prompt_tokens :].tolist()
        if length is None or length > MAX_TOKENS:
            assert output == [ORDINARY_TOKEN] * MAX_TOKENS
            assert one.finish_reason is FinishReason.LENGTH
        else:
            assert output == [ORDINARY_TOKEN] * (length - 1) + [END_TOKEN]
            assert one.finish_reason is FinishReason.STOP


def test_a_sequence_without_end_tokens_runs_to_its_limit() -> None:
    one = sequence(0, 5, ends=())
    simulate([one], output_length=lambda new: 3)
    assert one.finish_reason is FinishReason.LENGTH
    assert len(one.token_ids) == 5 + MAX_TOKENS


def test_virtual_time_is_the_cost_of_all_steps() -> None:
    cost = LinearCost(step_s=1.0, token_s=1e-2, key_s=1e-5)
    steps, scheduler, clock = simulate(job(), cost=cost)
    num_keys = sum(
        int(positions[-1]) + 1
        for step in steps
        for positions in np.split(step.positions, step.cu_seqlens_q[1:-1])
    )
    num_tokens = scheduler.stats.num_computed_tokens
    assert clock.now() == pytest.approx(len(steps) + 1e-2 * num_tokens + 1e-5 * num_keys)


def test_cost_of_one_step_by_hand() -> None:
    """Two prompts of 3 and 5 tokens, then one token of each on 4 and 6 keys."""
    cost = LinearCost(step_s=100.0, token_s=1.0, key_s=0.01)
    steps, _, clock = simulate(
        [sequence(0, 3), sequence(1, 5)], cost=cost, output_length=lambda new: 2
    )
    assert [cost.seconds(step) for step in steps] == pytest.approx([108.08, 102.10])
    assert clock.now() == pytest.approx(210.18)


def test_look_ahead_changes_no_output_and_costs_no_more_than_the_tokens_in_flight() -> None:
    outputs, num_computed = [], []
    for look_ahead in (0, 1):
        sequences = job()
        _, scheduler, _ = simulate(sequences, look_ahead=look_ahead)
        outputs.append([(one.token_ids.tolist(), one.finish_reason) for one in sequences])
        num_computed.append(scheduler.stats.num_computed_tokens)
    assert outputs[0] == outputs[1]
    num_stopped = sum(reason is FinishReason.STOP for _, reason in outputs[0])
    # Every end token that is not also the last possible one is found a Step late.
    assert 0 < num_computed[1] - num_computed[0] <= num_stopped


def test_the_same_job_makes_the_same_steps() -> None:
    runs = [simulate(job(), look_ahead=1, num_blocks=CROWDED)[0] for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert first.token_ids.tolist() == second.token_ids.tolist()
        assert first.kv_slots[0].tolist() == second.kv_slots[0].tolist()
        assert first.sample_slots.tolist() == second.sample_slots.tolist()


def test_virtual_clock_does_not_run_backwards() -> None:
    clock = VirtualClock()
    clock.advance(1.5)
    clock.advance(0.0)
    assert clock.now() == 1.5
    with pytest.raises(AssertionError):
        clock.advance(-1.0)
