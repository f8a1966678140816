"""The command as a process: signals, a full disk, a second start, another order of the input."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.job.fakes import read_lines, write_lines
from tests.job.faults.fake_command import ROOT, finish, outcome, rows, start

SOME_ROWS_FAILED, CANNOT_RUN, INTERRUPTED = 1, 2, 75


def new_job(folder: Path) -> Path:
    folder.mkdir()
    write_lines(folder / "in.jsonl", rows())
    return folder


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, list[Any]]:
    """How an undisturbed job ends."""
    calm = new_job(tmp_path / "calm")
    assert finish(start(calm))[0] == SOME_ROWS_FAILED
    return outcome(calm)


def wait_for(path: Path) -> None:
    """Until a file has a line."""
    give_up_s = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def goes_on(folder: Path, expected: dict[str, list[Any]]) -> None:
    assert finish(start(folder))[0] == SOME_ROWS_FAILED
    assert outcome(folder) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains(tmp_path: Path, expected: Any, number: signal.Signals) -> None:
    job = new_job(tmp_path / "job")
    process = start(job, step_s=0.1)
    wait_for(job / "out.jsonl")
    process.send_signal(number)
    status, said = finish(process)
    assert status == INTERRUPTED
    assert "running rows are finished first" in said
    assert "Give the same command to go on" in said
    assert 0 < len(outcome(job)["succeeded"]) < 9
    goes_on(job, expected)


def test_the_second_signal_ends_at_once(tmp_path: Path, expected: Any) -> None:
    job = new_job(tmp_path / "job")
    process = start(job, step_s=10)
    wait_for(job / "out.jsonl.job" / "metrics.jsonl")
    time.sleep(0.3)
    start_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == INTERRUPTED
    assert time.monotonic() - start_s < 8
    goes_on(job, expected)


@pytest.mark.slow
def test_signals_at_any_moment(tmp_path: Path, expected: Any) -> None:
    random, statuses = Random(3), []
    timed, start_s = new_job(tmp_path / "timed"), time.monotonic()
    finish(start(timed, step_s=0.03))
    length_s = time.monotonic() - start_s  # on a machine with other work most of it is the start
    run_s = read_lines(timed / "out.jsonl.job" / "metrics.jsonl")[-1]["t_s"]
    for attempt in range(60):
        job = new_job(tmp_path / str(attempt))
        process = start(job, step_s=0.03)
        if runs := attempt % 2:
            wait_for(job / "out.jsonl.job" / "metrics.jsonl")
        for _ in range(random.choice([1, 1, 2])):
            time.sleep(random.uniform(0, run_s if runs else length_s))
            process.send_signal(random.choice([signal.SIGTERM, signal.SIGINT]))
        process.communicate(timeout=60)
        statuses.append(process.returncode)
        goes_on(job, expected)
    print({status: statuses.count(status) for status in sorted(set(statuses))})
    # Before the handlers are there a signal does what it does to any Python program.
    before = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT}
    assert set(statuses) <= {SOME_ROWS_FAILED, INTERRUPTED} | before
    assert statuses.count(INTERRUPTED) > 10


def test_a_second_start_is_refused_and_harms_nothing(tmp_path: Path, expected: Any) -> None:
    job = new_job(tmp_path / "job")
    first = start(job, step_s=0.1)
    wait_for(job / "out.jsonl")
    first.send_signal(signal.SIGSTOP)  # or it might have ended before the second has begun
    status, said = finish(start(job))
    first.send_signal(signal.SIGCONT)
    assert status == CANNOT_RUN
    assert f"another process (pid {first.pid}) works on the job" in said
    assert finish(first)[0] == SOME_ROWS_FAILED
    assert outcome(job) == expected


def by_name(found: dict[str, list[Any]]) -> tuple[list[Any], list[Any]]:
    """An outcome without line numbers."""
    failed = [(line["custom_id"], line["error"]["code"]) for line in found["failed"]]
    return found["succeeded"], sorted(failed, key=str)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_input_changes_no_answer(tmp_path: Path, expected: Any, seed: int) -> None:
    random = Random(seed)
    job = new_job(tmp_path / "job")
    for _ in range(2):
        process = start(job, step_s=0.1)
        wait_for(job / "out.jsonl.job" / "metrics.jsonl")
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.communicate(timeout=60)
        shuffled = rows()
        random.shuffle(shuffled)
        write_lines(job / "in.jsonl", shuffled)
    assert finish(start(job))[0] == SOME_ROWS_FAILED
    assert by_name(outcome(job)) == by_name(expected)


EVERYDAY, EVERY = (3, 1 << 14), (64, 1 << 10)
SIZES = [
    pytest.param(EVERYDAY, id="some"),
    pytest.param(EVERY, id="many", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_limit_of_file_sizes(tmp_path: Path, expected: Any, sizes: tuple[int, int]) -> None:
    num_interrupted = 0
    for number in range(sizes[0]):
        job = new_job(tmp_path / str(number))
        limit = number * sizes[1]
        process = start(job)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        status, said = finish(process)
        assert status in (SOME_ROWS_FAILED, CANNOT_RUN, INTERRUPTED), said
        num_interrupted += status == INTERRUPTED
        assert status == SOME_ROWS_FAILED or "File too large" in said or "disk" in said, said
        goes_on(job, expected)
    print(f"{sizes[0]} limits, {num_interrupted} interrupted")
    assert num_interrupted >= sizes[0] / 3


# A job's own disk, which is enlarged after the job broke off.
SCRIPT = """
set -e
mount -t tmpfs -o size=$1k tmpfs "$2"
cp "$3/in.jsonl" "$2"
set +e
"$4" -m tests.job.faults.fake_command 0 run "$2/in.jsonl" -o "$2/out.jsonl" --model m
echo $? > "$3/first"
mount -o remount,size=16m tmpfs "$2"
"$4" -m tests.job.faults.fake_command 0 run "$2/in.jsonl" -o "$2/out.jsonl" --model m
echo $? > "$3/second"
cp "$2"/out.* "$3" -r
"""


@pytest.mark.parametrize("sizes", SIZES)
def test_a_full_disk(tmp_path: Path, expected: Any, sizes: tuple[int, int]) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("mounting is not permitted")
    (tmp_path / "disk").mkdir()
    num_interrupted = 0
    for number in range(1, sizes[0] + 1):
        job = new_job(tmp_path / str(number))
        size = f"{8 + number * max(4, sizes[1] >> 10)}"  # KiB; the input and the folder take 8
        script = ["sh", "-c", SCRIPT, "sh", size, str(tmp_path / "disk"), str(job), sys.executable]
        done = subprocess.run(
            ["unshare", "-rm", *script], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        first, second = (int((job / name).read_text()) for name in ("first", "second"))
        assert first in (SOME_ROWS_FAILED, CANNOT_RUN, INTERRUPTED), done.stderr
        assert second == SOME_ROWS_FAILED, done.stderr
        num_interrupted += first == INTERRUPTED
        assert outcome(job) == expected
        shutil.rmtree(job)
    print(f"{sizes[0]} sizes, {num_interrupted} interrupted")
    assert num_interrupted
