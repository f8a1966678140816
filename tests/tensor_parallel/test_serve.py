"""`batchwright serve --tensor-parallel-size 2` when a rank is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from batchwright.llm import LLM
from batchwright.request import SamplingParams
from tests.running_job import INTERRUPTED, PARAMS, PROMPTS, ROOT, is_running, make_model
from tests.server.running import begin, ended, lines_of, until

pytestmark = pytest.mark.cpu


@contextmanager
def serving(model: Path) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI, str]]:
    """(process, client, root URL) of a server of two ranks, killed at the end."""
    command = [sys.executable, "-m", "batchwright.cli.main", "serve", "--model", str(model)]
    command += ["--port", "0", "--data", str(model.parent / "data"), "--device", "cpu"]
    command += ["--threads", "1", "--max-num-seqs", "6", "--tensor-parallel-size", "2"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if line.startswith("Serving"))
            url = line.partition("(API: ")[2].rstrip(")\n")
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                yield process, client, url.removesuffix("/v1")
        finally:
            process.kill()


def num_open_calls(root: str) -> float:
    with urllib.request.urlopen(f"{root}/dashboard.json", timeout=20) as answer:
        return json.load(answer)["engine"]["num_open_calls"]


def test_a_killed_rank_ends_the_server_and_the_same_command_ends_the_batch_well(tmp_path):
    model = make_model(tmp_path / "model")
    rows = [
        {
            "custom_id": str(index),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": prompt, **PARAMS},
        }
        for index, prompt in enumerate(PROMPTS)
    ]
    with serving(model) as (process, client, root):
        batch = begin(client, rows, endpoint="/v1/completions")
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 2, 60)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        (follower,) = map(int, children.split())
        os.kill(follower, signal.SIGSTOP)  # so that the call is surely still running
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.completions.create, model=str(model), prompt="w1 w2")
            until(lambda: num_open_calls(root) == 1)
            os.kill(follower, signal.SIGKILL)
            with pytest.raises(openai.APIStatusError, match="rank 1 was ended by signal 9") as told:
                call.result(60)
        assert (told.value.status_code, told.value.code) == (503, "service_unavailable")
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED, stderr
        assert "batchwright: rank 1 was ended by signal 9" in stderr and "Traceback" not in stderr
        assert not is_running(follower)
    (results,) = (tmp_path / "data").glob("batches/*.job/results.jsonl")
    before = results.read_bytes()
    assert 0 < before.count(b"\n") < len(PROMPTS)
    with serving(model) as (process, client, root):
        found = ended(client, batch, 60)
        assert (found.status, found.request_counts.completed) == ("completed", len(PROMPTS))
        assert results.read_bytes().startswith(before), "nothing is run twice"
        llm = LLM(model, device="cpu", num_threads=1)
        alone = llm.generate(PROMPTS, SamplingParams(**PARAMS))
        assert {
            int(line["custom_id"]): line["response"]["body"]["choices"][0]["text"]
            for line in lines_of(client, found.output_file_id)
        } == {index: result.outputs[0].text for index, result in enumerate(alone)}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
