"""How many rows a second do reading, checking, tokenising, scheduling, journal and writing manage?

Completions rows of about 64 prompt tokens and 8 output tokens go through the whole job, with the
real tokenizer and a simulated model: everything but the model's arithmetic is paid. Each size runs
in a process of its own, so that peak memory is its own; it must not grow with the number of rows.
The limit expected is the one Python thread that schedules and writes.

    python -m benchmarks.job_rows --rows 100k --rows 1m
    python -m benchmarks.job_rows --rows 1m --random-ids   ids in no order: harder on the journal
    python -m benchmarks.job_rows --rows 1m --kill         kill -9 at half, go on, count the ids
    python -m benchmarks.job_rows --order prefix_dfs       with an order over the whole file

Afterwards the output is read: each id must be there once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from batchwright.cli.numbers import parse_count
from benchmarks.machine import describe_machine

WORDS = "the of and to in is was for on that with as it at by from his be this which or had not are"
PROMPT_WORDS = 62
OUTPUT_TOKENS = 8


def row_id(index: int, *, random_ids: bool) -> str:
    """The id of a row."""
    name = f"row-{index}"
    return hashlib.md5(name.encode()).hexdigest() if random_ids else name


def write_rows(path: Path, num_rows: int, *, random_ids: bool = False) -> None:
    """Rows of random words, none shared on purpose."""
    random, words = Random(1), WORDS.split()
    with path.open("w", encoding="utf-8") as file:
        for index in range(num_rows):
            text = " ".join(random.choices(words, k=PROMPT_WORDS))
            body = {"prompt": f"{index} {text}", "max_tokens": OUTPUT_TOKENS, "temperature": 0}
            row = {
                "custom_id": row_id(index, random_ids=random_ids),
                "method": "POST",
                "url": "/v1/completions",
                "body": body,
            }
            file.write(json.dumps(row) + "\n")


def run_one(folder: Path, order: str) -> dict:
    """The job, in this process."""
    from batchwright.job.directory import JobDirectory
    from batchwright.job.formats.arranged_lines import Arrangement
    from batchwright.job.formats.read_input import read_input
    from batchwright.job.run_job import JobPaths, run_job
    from batchwright.job.runner import JobOptions
    from benchmarks.simulated_model import SimulatedModel

    model = SimulatedModel(kv_blocks=4096, order=order)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    with JobDirectory(folder / "out.jsonl.job") as directory:
        summary = run_job(
            read_input(str(folder / "in.jsonl"), arrangement=Arrangement(model.order)),
            JobPaths(str(folder / "out.jsonl"), str(folder / "out.errors.jsonl")),
            directory,
            model,
            JobOptions(model_name="simulated", created=0),
        )
    seconds = time.perf_counter() - start_s
    assert summary.num_succeeded + summary.num_skipped == summary.num_rows_read
    return {
        "rows": summary.num_succeeded,
        "rows_skipped": summary.num_skipped,
        "seconds": seconds,
        "cpu_s": time.process_time() - start_cpu_s,
        "rows_per_s": summary.num_succeeded / seconds,
        "prompt_tokens": summary.num_prompt_tokens,
        "output_tokens": summary.num_output_tokens,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """The most memory this process had resident; what getrusage tells begins with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def run_apart(folder: Path, order: str) -> dict:
    """The job in a process of its own, to its end."""
    done = subprocess.run(child(folder, order), check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(folder: Path, order: str) -> list[str]:
    """The command that runs the job in `folder`, or goes on with it."""
    return [sys.executable, "-m", "benchmarks.job_rows", "--folder", str(folder), "--order", order]


def kill_at_half(folder: Path, num_rows: int, order: str) -> int:
    """Start the job and kill it when half of the rows are done; returns how many are."""
    from batchwright.job.journal import RowState, count_states, read_only

    process = subprocess.Popen(child(folder, order), stdout=subprocess.DEVNULL)
    job = folder / "out.jsonl.job"
    num_done = 0
    while process.poll() is None and num_done < num_rows // 2:
        time.sleep(1.0)
        if (job / "metrics.jsonl").exists():
            num_done = count_states(read_only(job))[RowState.SUCCEEDED]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    return count_states(read_only(job))[RowState.SUCCEEDED]


def count_ids(folder: Path, num_rows: int, *, random_ids: bool) -> None:
    """Each row is in the output once."""
    missing = {row_id(index, random_ids=random_ids) for index in range(num_rows)}
    with (folder / "out.jsonl").open("rb") as file:
        for line in file:
            missing.remove(json.loads(line)["custom_id"])
    assert not missing, f"{len(missing)} rows are missing"


def measure(num_rows: int, order: str, *, random_ids: bool, kill: bool) -> dict:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "in.jsonl", num_rows, random_ids=random_ids)
        killed = {"rows_when_killed": kill_at_half(folder, num_rows, order)} if kill else {}
        result = {**run_apart(folder, order), "order": order, "random_ids": random_ids, **killed}
        assert result["rows_skipped"] == killed.get("rows_when_killed", 0)
        count_ids(folder, num_rows, random_ids=random_ids)
    print(
        f"{result['rows']:>9,} rows  {result['seconds']:7.1f} s  {result['rows_per_s']:7,.0f} "
        f"rows/s  {result['peak_bytes'] / 2**20:6,.0f} MiB at the peak"
        + (f"  after {result['rows_skipped']:,} before it was killed" if kill else "")
    )
    return result


def main() -> None:
    """Run each size and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=parse_count, action="append", default=None)
    parser.add_argument("--random-ids", action="store_true")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--order", default="fcfs", help="a file of batchwright/plan/orders")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        print(json.dumps(run_one(arguments.folder, arguments.order)))
        return
    results = [
        measure(num_rows, arguments.order, random_ids=arguments.random_ids, kill=arguments.kill)
        for num_rows in arguments.rows or [100_000, 1_000_000]
    ]
    print(
        json.dumps({"benchmark": "benchmarks.job_rows", "results": results, **describe_machine()})
    )


if __name__ == "__main__":
    main()
