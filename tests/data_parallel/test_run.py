"""`batchwright run --data-parallel-size 2`: whole jobs, and what is left after kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.running_job import INTERRUPTED, ROOT, Job, is_running, make_model

pytestmark = pytest.mark.cpu

TWO = ("--data-parallel-size", "2")
ONE = ("--data-parallel-size", "1")
MIXED = [
    {"id": "text", "prompt": "w3 w4", "max_tokens": 9},
    {"id": "three", "prompt": "w5 w6 w7", "max_tokens": 9, "n": 3, "logprobs": 2},
    {
        "custom_id": "vector",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"input": ["w8 w9", "w10"]},
    },
    {
        "custom_id": "score",
        "method": "POST",
        "url": "/v1/score",
        "body": {"context": "w3 w4", "continuation": " w5"},
    },
    {"id": "form", "prompt": "w11", "structured_outputs": {"regex": r"( ?w\d+){1,4}"}},
    {"id": "wrong", "prompt": "w11", "temperature": "hot"},
    {"id": "long", "prompt": "w3 " * 300},
]

LONG = [
    {"id": str(i), "prompt": f"w{i % 80} w{i}", "max_tokens": 250, "ignore_eos": True}
    for i in range(120)  # more than end while a signal is on its way
]


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "model")


def answers(job: Job) -> dict[str, Any]:
    """Lines by id, without the moment and what was taken from shared prefixes."""
    lines = {}
    for line in job.lines():
        body = line["response"]["body"]
        body.pop("created", None)
        body.get("usage", {}).pop("prompt_tokens_details", None)
        assert line["custom_id"] not in lines
        lines[line["custom_id"]] = line
    return lines


def test_a_job_of_all_kinds_of_rows_has_the_same_lines(model):
    jobs = [Job(model, *options, rows=MIXED, name=options[1]) for options in (ONE, TWO)]
    for job in jobs:
        process = job.start()
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1, stderr  # some rows are wrong
    assert answers(jobs[0]) == answers(jobs[1]) and len(answers(jobs[0])) >= 5
    errors = [job.output.with_suffix(".errors.jsonl").read_text() for job in jobs]
    assert sorted(errors[0].splitlines()) == sorted(errors[1].splitlines())
    assert len(errors[0].splitlines()) == 2


@pytest.mark.slow  # and in test_replicas.py, without a job
def test_a_killed_replica_costs_no_row_and_is_told(model):
    job = Job(model, *TWO, rows=LONG)
    process, pids = job.started()
    os.kill(pids[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "was ended by signal 9" in stderr and "1 of 2 replicas go on" in stderr
    texts = job.texts()
    assert len(job.lines()) == len(texts) == len(LONG)
    last = json.loads((Path(f"{job.output}.job") / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["rows_succeeded"] == len(LONG) and last["generated_tokens"] >= 250 * len(LONG)
    job.run("--force", *ONE)
    assert job.texts() == texts


def test_without_replicas_the_run_ends_and_goes_on_with_any_number(model):
    job = Job(model, *TWO, rows=LONG)
    process, pids = job.started()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, stderr
    assert "none of 2 replicas" in stderr and "Traceback" not in stderr
    done = job.texts()
    assert 0 < len(done) < len(LONG)
    job.run(*ONE)
    texts = job.texts()
    assert len(job.lines()) == len(texts) == len(LONG) and done.items() <= texts.items()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_job_goes_on_and_no_process_is_left(number, model):
    job = Job(model, *TWO, rows=LONG)
    process, pids = job.started()
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else INTERRUPTED), stderr
    assert "Traceback" not in stderr
    deadline_s = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(is_running, pids))
    done = job.texts()
    assert len(done) < len(LONG)
    job.run()
    texts = job.texts()
    assert len(job.lines()) == len(texts) == len(LONG) and done.items() <= texts.items()


@pytest.mark.slow
def test_a_second_interrupt_ends_it_at_once(model):
    job = Job(model, *TWO, rows=LONG)
    process, pids = job.started(1)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED and "Traceback" not in stderr, stderr
    assert not any(map(is_running, pids)) and 0 < len(job.texts()) < len(LONG)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data-parallel-size", "2", "--tensor-parallel-size", "2"), "leave one of them out"),
        (("--data-parallel-size", "2", "--kv-cache-memory", "1k"), "raise kv_cache_bytes"),
        (("--data-parallel-size", "2", "--device", "cuda"), "device is cuda, but torch finds no"),
    ],
)
def test_what_cannot_run_is_said_at_once(model, options, words):
    if options[-1] == "cuda":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            options, words = options, "replicas are for the CPU"
    job = Job(model)
    process = job.start(*options)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and words in stderr and "Traceback" not in stderr, stderr


def test_plans_count_all_replicas(model):
    job = Job(model)
    command = [sys.executable, "-m", "batchwright.cli.main", "plan", str(job.rows), "--json"]
    command += ["--model", str(model), "--device", "cpu", "--threads", "1"]
    command += ["--kv-cache-memory", str(10 * 32 * 3 * 2 * 2 * 10 * 4)]
    plans = []
    for options in (ONE, TWO):
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        plans.append(json.loads(done.stdout))
    assert plans[1]["rows"] == plans[0]["rows"]
    assert plans[1]["memory"]["kv_tokens"] == [2 * n for n in plans[0]["memory"]["kv_tokens"]]
