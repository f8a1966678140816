"""The simulated executor drives the same scheduler: same job, same lengths, same Steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from batchwright.clock import VirtualClock
from batchwright.exec.sim import SimExecutor
from batchwright.step import Step
from batchwright.techniques import names
from tests.engine.harness import Run, mixed_job, run
from tests.models.reference import make_checkpoint

pytestmark = pytest.mark.cpu

ARRAYS = [f.name for f in dataclasses.fields(Step) if f.name not in ("new_sequences", "score_top")]


class Recorder:
    """Passes Steps on and keeps them."""

    def __init__(self, executor) -> None:
        self.executor, self.steps = executor, []

    def execute(self, step: Step):
        self.steps.append(step)
        return self.executor.execute(step)


def real_and_simulated(path, **settings) -> tuple[Run, list[Step], list[Step], VirtualClock]:
    """Run a job for real, then simulated with the output lengths it really had."""
    recorders: list[Recorder] = []

    def record(engine):
        recorders.append(Recorder(engine._executor))
        engine._executor = recorders[-1]

    ends = {"stop_token_ids": tuple(range(3, 90, 6))}
    job = mixed_job(max_tokens=12, **ends)
    outcome = run(path, job, prepare=record, **settings)
    lengths = {
        (r.request_id, o.index): len(o.token_ids)
        for r in outcome.results.values()
        for o in r.outputs
    }
    ids = {r.prompt_token_ids.tobytes(): r.id for r in job if r.id not in ("r6",)}
    clock = VirtualClock()

    def simulate(engine):
        def output_length(new):
            prompt = new.token_ids[: new.num_prompt_tokens]
            return lengths[ids[prompt.tobytes()], new.sample_index]

        recorders.append(Recorder(SimExecutor(clock, output_length=output_length)))
        engine._executor = recorders[-1]

    simulated = run(path, job, prepare=simulate, **settings)
    assert simulated.engine.stats == outcome.engine.stats
    return outcome, recorders[0].steps, recorders[1].steps, clock


def assert_same_steps(real: list[Step], simulated: list[Step]) -> None:
    assert len(real) == len(simulated)
    for ours, theirs in zip(real, simulated, strict=True):
        for name in ARRAYS:
            np.testing.assert_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        for a, b in zip(ours.new_sequences, theirs.new_sequences, strict=True):
            assert (a.slot, a.num_prompt_tokens, a.sample_index) == (
                b.slot, b.num_prompt_tokens, b.sample_index)  # fmt: skip
            assert len(a.token_ids) == len(b.token_ids)


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("name", ["llama", "qwen2_window"])
def test_simulated_steps_equal_real_ones(name, look_ahead, tmp_path):
    make_checkpoint(name, tmp_path)
    outcome, real, simulated, clock = real_and_simulated(
        tmp_path, look_ahead=look_ahead, max_num_batched_tokens=50, max_num_seqs=5
    )
    finished = {o.finish_reason for r in outcome.results.values() for o in r.outputs}
    assert finished == {"stop", "length"}, "the job should end in both ways"
    assert_same_steps(real, simulated)
    assert clock.now() > 0


@pytest.mark.parametrize("order", [name for name in names("plan.orders") if name != "fcfs"])
def test_simulated_steps_equal_real_ones_in_every_order(order, tmp_path):
    make_checkpoint("llama", tmp_path)
    settings = {"max_num_batched_tokens": 50, "max_num_seqs": 5, "kv_tokens": 320}
    _, real, simulated, _ = real_and_simulated(tmp_path, order=order, **settings)
    assert_same_steps(real, simulated)


def test_the_comparison_can_fail(tmp_path):
    make_checkpoint("llama", tmp_path)
    _, real, _, _ = real_and_simulated(tmp_path, max_num_batched_tokens=50, max_num_seqs=5)
    _, other, _, _ = real_and_simulated(tmp_path, max_num_batched_tokens=49, max_num_seqs=5)
    with pytest.raises(AssertionError):
        assert_same_steps(real, other)
