"""Runs one small job again and again, each time with another file operation failing.

Started with failing_io.so preloaded: `python -m tests.job.faults.driver LIBRARY FOLDER MODE STRIDE`
disturbs operation 1, 1 + STRIDE, ...; mode `moment` kills the job at STRIDE random moments instead.
The job runs in forked children, so that a killed one does not end the driver. After each disturbed
run the job is gone on with, undisturbed, and its files are compared with those of a job that was
never disturbed. Prints one JSON line.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

from batchwright.errors import BatchwrightError
from batchwright.job import journal
from batchwright.job.directory import JobDirectory
from batchwright.job.run_job import JobPaths, run_job
from batchwright.job.runner import JobOptions
from tests.job.fakes import FakeEngine, FakeModel, chat_row, read_lines, read_rows, write_lines

MODES = {"fail": 1, "full": 2, "torn": 3, "kill": 4, "tear": 5}
CRASHED = 70

journal.MAX_PENDING_ROWS = 2  # many commits in a small job


def rows() -> list[Any]:
    good = [chat_row(f"r{i}", "x" * i, max_tokens=1 + i % 3, n=1 + i % 2) for i in range(9)]
    return [*good, b"{broken", chat_row("hot", temperature="hot"), chat_row("refused")]


def run(folder: Path) -> None:
    """The job, begun or gone on with."""
    directory = JobDirectory(folder / "out.jsonl.job")
    try:
        run_job(
            read_rows(folder / "in.jsonl"),
            JobPaths(str(folder / "out.jsonl"), str(folder / "out.errors.jsonl")),
            directory,
            FakeModel(FakeEngine(max_running=3, refuse=["refused"])),
            JobOptions(model_name="m", created=5),
        )
    finally:
        directory.close()


def in_child(
    folder: Path, library: Any, number: int, mode: int, *, kill_after_s: float | None = None
) -> tuple[int, int]:
    """Run the job in a child; returns (exit status, operations counted)."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = CRASHED
        try:
            library.arm(str(folder).encode(), number, mode)
            run(folder)
            status = 0
        except BatchwrightError as error:
            status = 75
            os.write(2, f"{error}\n".encode())
        except BaseException:  # noqa: BLE001 - told, and the child ends
            os.write(2, traceback.format_exc().encode())
        finally:
            os.write(write_end, str(library.operations()).encode())
            os._exit(status)
    os.close(write_end)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    counted = os.read(read_end, 64)
    os.close(read_end)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), int(counted or b"0")


def outcome(folder: Path) -> dict[str, list[Any]]:
    """What the files say, without the order in which rows ended."""
    lines = read_lines(folder / "out.jsonl")
    errors = read_lines(folder / "out.errors.jsonl")
    return {
        "succeeded": sorted(lines, key=lambda line: line["custom_id"]),
        "failed": sorted(errors, key=lambda line: line["error"]["line"]),
    }


def main(library_path: str, root: str, mode: str, stride: int) -> None:
    """Disturb the job at each point in turn, and print what came of it."""
    library = ctypes.CDLL(library_path)
    library.operations.restype = ctypes.c_long
    library.arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    calm = Path(root) / "calm"
    calm.mkdir()
    write_lines(calm / "in.jsonl", rows())
    start_s = time.perf_counter()
    status, num_operations = in_child(calm, library, 0, MODES["fail"])
    calm_s = time.perf_counter() - start_s
    assert status == 0
    expected = outcome(calm)
    random = Random(stride)
    statuses: dict[int, int] = {}
    problems: list[str] = []
    points = range(stride) if mode == "moment" else range(1, num_operations + 1, stride)
    for point in points:
        folder = Path(root) / f"{mode}-{point}"
        folder.mkdir()
        write_lines(folder / "in.jsonl", rows())
        if mode == "moment":
            moment_s = random.uniform(0, calm_s)
            status, _ = in_child(folder, library, 0, MODES["fail"], kill_after_s=moment_s)
        else:
            status, _ = in_child(folder, library, point, MODES[mode])
        statuses[status] = statuses.get(status, 0) + 1
        if status not in (0, 75, -signal.SIGKILL):
            problems.append(f"point {point}: exit status {status}")
        again, _ = in_child(folder, library, 0, MODES["fail"])
        if again != 0 or outcome(folder) != expected:
            problems.append(f"point {point}: not the same after going on (status {again})")
        else:
            shutil.rmtree(folder)
    report = {"operations": num_operations, "points": len(points)}
    print(json.dumps(report | {"statuses": statuses, "problems": problems}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
