"""`batchwright run --tensor-parallel-size 2`: whole jobs, and what is left after kills."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from batchwright.errors import ConfigError
from batchwright.llm import LLM
from batchwright.opened_model import answer_identity, open_model
from batchwright.request import SamplingParams
from batchwright.text.tokenizer import load_tokenizer
from tests.running_job import INTERRUPTED, PARAMS, PROMPTS, Job, is_running, make_model

pytestmark = pytest.mark.cpu

# a process: ten blocks of 32 tokens, keys and values, 3 layers, 2 heads of 10 dimensions, fp32
KV = {"kv_cache_bytes": 10 * 32 * 3 * 2 * 2 * 10 * 4}


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "model")


def test_a_killed_rank_ends_the_job_and_the_same_command_ends_it_well(model):
    job = Job(model, "--tensor-parallel-size", "2")
    process, (follower,) = job.started()
    os.kill(follower, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, stderr
    assert "batchwright: rank 1 was ended by signal 9" in stderr and "Traceback" not in stderr
    assert 0 < job.num_done() < len(PROMPTS)
    process = job.start()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    llm = LLM(model, device="cpu", num_threads=1)
    alone = [result.outputs[0].text for result in llm.generate(PROMPTS, SamplingParams(**PARAMS))]
    assert job.texts() == {str(i): text for i, text in enumerate(alone)}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_is_left(number, model):
    process, followers = Job(model, "--tensor-parallel-size", "2").started()
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else INTERRUPTED)
    deadline_s = time.monotonic() + 10
    while any(map(is_running, followers)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert len(followers) == 1 and not any(map(is_running, followers))


def test_a_job_on_cpus_keeps_its_number_of_ranks(model):
    """Bits are promised there; between GPUs they are not, and cards may be fewer next time."""
    identities = [
        open_model(str(model), {"device": "cpu", "tensor_parallel_size": size}).identity()
        for size in (1, 2)
    ]
    assert identities[1] == {**identities[0], "tensor_parallel_size": 2}
    config = open_model(str(model), {"device": "cpu", "tensor_parallel_size": 2}).config
    on_gpus = answer_identity("", load_tokenizer(model), replace(config, device="cuda"))
    assert "tensor_parallel_size" not in on_gpus


def test_a_plan_counts_the_memory_of_all_ranks(model):
    for size in (1, 2):
        opened = open_model(str(model), {"device": "cpu", "tensor_parallel_size": size, **KV})
        assert opened.groups[0].num_blocks == size * 10
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3"):
        open_model(str(model), {"device": "cpu", "tensor_parallel_size": 3})
