"""The real command with the real model, killed at random moments until the job is done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.job.fakes import chat_row, read_lines, write_lines

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

NUM_KILLS = 50
LONGEST_RUN = 1 / 4  # of the undisturbed job's time, between the start of a run and its kill
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def rows() -> list[Any]:
    """Greedy, sampled, n > 1 and structured rows, one bad one, and some that share a prefix."""
    shared = "You are a careful assistant. " * 12
    out: list[Any] = []
    for i in range(12):
        out.append(chat_row(f"greedy-{i}", f"{shared}Say {i}.", max_tokens=16, temperature=0))
        out.append(chat_row(f"sampled-{i}", f"Tell me about {i}.", max_tokens=16))
        out.append(chat_row(f"twice-{i}", f"A word for {i}?", max_tokens=8, n=2))
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        out.append(chat_row(f"form-{i}", f"Person {i}.", max_tokens=40, response_format=form))
    for row in out:
        row["body"].pop("model")
    return [*out, chat_row("hot", temperature="hot")]


def command(folder: Path) -> list[str]:
    source, output = str(folder / "in.jsonl"), str(folder / "out.jsonl")
    return [
        *(sys.executable, "-m", "batchwright.cli.main", "run", source, "-o", output),
        *("--model", "smollm2", "--max-num-seqs", "4"),
    ]


def run_and_kill(folder: Path, after_s: float) -> bool:
    """Start the job and kill it so long after its first step could begin; False if it ended."""
    metrics = folder / "out.jsonl.job" / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    process = subprocess.Popen(
        command(folder), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_size == size):
        time.sleep(0.02)
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def run_seconds(folder: Path) -> float:
    """How long the last run took, without loading the model."""
    return read_lines(folder / "out.jsonl.job" / "metrics.jsonl")[-1]["t_s"]


def texts(folder: Path) -> dict[str, list[str]]:
    lines = read_lines(folder / "out.jsonl")
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {
        line["custom_id"]: [
            choice["message"]["content"] for choice in line["response"]["body"]["choices"]
        ]
        for line in lines
    }


def test_a_job_killed_fifty_times_has_every_row_once(tmp_path: Path) -> None:
    calm = tmp_path / "calm"
    calm.mkdir()
    write_lines(calm / "in.jsonl", rows())
    assert subprocess.run(command(calm), capture_output=True, check=False).returncode == 1
    expected = texts(calm)
    assert len(expected) == len(rows()) - 1
    random, num_kills, num_jobs, num_midway = Random(5), 0, 0, 0
    longest_s = run_seconds(calm) * LONGEST_RUN
    while num_kills < NUM_KILLS:
        folder = tmp_path / f"job-{num_jobs}"
        folder.mkdir()
        write_lines(folder / "in.jsonl", rows())
        num_jobs += 1
        while num_kills < NUM_KILLS and run_and_kill(folder, random.uniform(0, longest_s)):
            num_kills += 1
            num_midway += b"\n" in (folder / "out.jsonl").read_bytes()
        assert subprocess.run(command(folder), capture_output=True, check=False).returncode == 1
        assert texts(folder) == expected
        (error,) = read_lines(folder / "out.errors.jsonl")
        assert error["custom_id"] == "hot"
    counts = {"kills": num_kills, "midway": num_midway, "jobs": num_jobs, "rows": len(expected)}
    print(json.dumps(counts | {"longest_s": longest_s}))
    assert num_midway > NUM_KILLS / 2  # of the kills, when some rows were done already
    assert os.path.exists(folder / "out.jsonl.job" / "summary.json")
