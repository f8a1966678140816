"""`batchwright run --tensor-parallel-size 2`: whole jobs, and what is left after kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from batchwright.errors import ConfigError
from batchwright.llm import LLM
from batchwright.opened_model import answer_identity, open_model
from batchwright.request import SamplingParams
from batchwright.text.tokenizer import load_tokenizer
from tests.models.reference import make_checkpoint
from tests.tensor_parallel.test_failures import is_running

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parent.parent.parent
INTERRUPTED = 75
PARAMS = {"max_tokens": 120, "temperature": 0.0, "ignore_eos": True}
# a process: ten blocks of 32 tokens, keys and values, 3 layers, 2 heads of 10 dimensions, fp32
KV = {"kv_cache_bytes": 10 * 32 * 3 * 2 * 2 * 10 * 4}
PROMPTS = [f"w{i % 80} w{i % 7} w{i}" for i in range(3, 33)]


@pytest.fixture
def model(tmp_path) -> Path:
    """A tiny checkpoint whose tokenizer knows the words w0, w1, ..."""
    path = tmp_path / "model"
    make_checkpoint("qwen3", path, intermediate_size=38)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


class Job:
    """A command that can be started again and again."""

    def __init__(self, model: Path) -> None:
        self.output = model.parent / "out.jsonl"
        rows = model.parent / "in.jsonl"
        lines = [
            {"id": str(index), "prompt": prompt, **PARAMS} for index, prompt in enumerate(PROMPTS)
        ]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._command = [
            *(sys.executable, "-m", "batchwright.cli.main", "run", str(rows)),
            *("-o", str(self.output), "--model", str(model), "--device", "cpu"),
            *("--threads", "1", "--max-num-seqs", "6", "--tensor-parallel-size", "2"),
        ]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def started(self, num_more: int = 3) -> tuple[subprocess.Popen[str], list[int]]:
        """The command, with some rows more than before, and its children."""
        before = self.num_done()
        process = self.start()
        for _ in range(600):
            if self.num_done() >= before + num_more or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        return process, [int(pid) for pid in children.split()]

    def num_done(self) -> int:
        return self.output.read_text().count("\n") if self.output.exists() else 0

    def texts(self) -> dict[str, str]:
        lines = map(json.loads, self.output.read_text().splitlines())
        return {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}


def test_a_killed_rank_ends_the_job_and_the_same_command_ends_it_well(model):
    job = Job(model)
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
    process, followers = Job(model).started()
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
