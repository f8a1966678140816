"""Steps that run as programs have the bits of the same steps computed call by call."""

from types import SimpleNamespace

import pytest
import torch

from batchwright import kernels
from batchwright.engine import Engine
from batchwright.exec import step_programs
from batchwright.exec.step_programs import StepPrograms
from batchwright.kernels.program import NUM_TASKS
from tests.engine.harness import Run, mixed_job, run
from tests.models.reference import TINY, make_checkpoint

pytestmark = pytest.mark.cpu

TORCH_COMPUTES_A_PART = ("gemma", "gpt", "opt", "mixtral", "qwen3_moe")
"""Beginnings of the names of models that cannot be recorded."""


def call_by_call(engine: Engine) -> None:
    engine._executor.programs = None


def both_ways(path, job, **settings) -> tuple[Run, Run]:
    return run(path, job, **settings), run(path, job, prepare=call_by_call, **settings)


def num_programs(one: Run) -> int:
    return len(one.engine._executor.programs._programs)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture(name, tmp_path):
    make_checkpoint(name, tmp_path)
    programs, calls = both_ways(tmp_path, mixed_job(20), max_num_seqs=6)
    assert programs.logits == calls.logits
    assert programs.tokens() == calls.tokens()
    assert (num_programs(programs) > 0) != name.startswith(TORCH_COMPUTES_A_PART)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_threads": 2},
        {"quantize": "int8"},
        {"kv_cache_dtype": "int8"},
        {"kv_cache_dtype": "bfloat16", "num_threads": 2, "quantize": "int8"},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},  # prompts are programs too
        {"kv_cache_bytes": 120_000, "max_num_seqs": 8},  # rows are preempted
    ],
    ids=str,
)
def test_settings(settings, tmp_path):
    make_checkpoint("llama_biased", tmp_path)
    programs, calls = both_ways(tmp_path, mixed_job(20), **settings)
    assert programs.logits == calls.logits
    assert num_programs(programs) > 0


def test_attention_has_all_threads_however_short_the_recorded_rows_are(tmp_path):
    """Other steps of as many tokens may have far more keys."""
    make_checkpoint("llama", tmp_path)
    one = run(tmp_path, mixed_job(20), max_num_seqs=6, num_threads=2)
    for kept in one.engine._executor.programs._programs.values():
        program = kept.program
        tasks = program._calls[:, NUM_TASKS].tolist()
        of_attention = {
            number
            for kernel, number in zip(program.kernels, tasks, strict=True)
            if kernel == "paged_attention"
        }
        assert of_attention == {kernels.get_num_threads()}


def test_few_programs_are_kept(tmp_path, monkeypatch):
    """What those took that are dropped is still told."""
    monkeypatch.setattr(step_programs, "MAX_PROGRAMS", 1)
    make_checkpoint("qwen3", tmp_path)
    programs, calls = both_ways(tmp_path, mixed_job(20), max_num_seqs=6)
    assert programs.logits == calls.logits
    assert num_programs(programs) == 1
    kept = programs.engine._executor.programs
    (last,) = kept._programs.values()
    total, of_last = kept.seconds_by_kernel(), last.program.seconds_by_kernel()
    assert all(total[kernel] > seconds for kernel, seconds in of_last.items())


class Interrupted:
    """A model that torch computes, whose first step is interrupted."""

    def __init__(self) -> None:
        self.steps = 0

    def through_layers(self, x, attend):
        self.steps += 1
        if self.steps == 1:
            raise KeyboardInterrupt
        return x + 1.0


def test_an_interrupted_first_step_checks_nothing():
    model, backend = Interrupted(), SimpleNamespace(plan=lambda batch: None)
    programs = StepPrograms(model, backend, [], [])
    with pytest.raises(KeyboardInterrupt):
        programs.run(torch.zeros(2, 3), None)
    for _ in range(5):
        assert programs.run(torch.zeros(2, 3), None) is None
    assert model.steps == 2


def test_an_unrecordable_model_is_tried_once(tmp_path, monkeypatch):
    tries = []
    check = step_programs.check
    monkeypatch.setattr(step_programs, "check", lambda compute: tries.append(1) or check(compute))
    make_checkpoint("mixtral", tmp_path)
    run(tmp_path, mixed_job(20), max_num_seqs=6)
    assert len(tries) == 1
