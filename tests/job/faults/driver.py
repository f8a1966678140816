"""Runs the command on one small job again and again, each time with another operation failing.

Started with failing_io.so preloaded: `python -m tests.job.faults.driver LIBRARY FOLDER MODE STRIDE`
disturbs operation 1, 1 + STRIDE, ...; mode `quota` lets 1, 1 + STRIDE, ... bytes be written, and
mode `moment` kills the job at random moments instead, until that was before its end STRIDE times.
The command runs in forked children, so that a killed one does not end the driver. After each
disturbed run the command is given again, undisturbed, and the files are compared with those of a
job that was never disturbed. Prints one JSON line.
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
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from tests.job.fakes import write_lines
from tests.job.faults.fake_command import arguments, outcome, rows
from tests.job.faults.fake_command import main as run_command

MODES = {"fail": 1, "full": 2, "torn": 3, "kill": 4, "tear": 5, "quota": 6}
SOME_ROWS_FAILED, CANNOT_RUN, CRASHED, INTERRUPTED = 1, 2, 70, 75


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
            status = run_command(arguments(folder))
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


def main(library_path: str, root: str, mode: str, stride: int) -> None:
    """Disturb the job at each point in turn, and print what came of it."""
    library = ctypes.CDLL(library_path)
    library.operations.restype = ctypes.c_long
    library.arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    report_fd = os.dup(1)
    os.dup2(2, 1)  # what the command prints is no part of the report
    warm, calm = Path(root) / "warm", Path(root) / "calm"
    for folder in (warm, calm):
        folder.mkdir()
        write_lines(folder / "in.jsonl", rows())
    run_command(arguments(warm))  # imports everything, which each child would do again
    start_s = time.perf_counter()
    counting = (2**62, MODES["quota"]) if mode == "quota" else (0, MODES["fail"])
    status, num_operations = in_child(calm, library, *counting)
    calm_s = time.perf_counter() - start_s
    assert status == SOME_ROWS_FAILED
    expected = outcome(calm)
    random = Random(stride)
    statuses: dict[int, int] = {}
    problems: list[str] = []
    points: Iterable[int] = count() if mode == "moment" else range(1, num_operations + 1, stride)
    num_points = 0
    for point in points:
        if mode == "moment" and statuses.get(-signal.SIGKILL, 0) == stride:
            break
        num_points += 1
        folder = Path(root) / f"{mode}-{point}"
        folder.mkdir()
        write_lines(folder / "in.jsonl", rows())
        if mode == "moment":
            moment_s = random.uniform(0, calm_s)
            status, _ = in_child(folder, library, 0, MODES["fail"], kill_after_s=moment_s)
        else:
            status, _ = in_child(folder, library, point, MODES[mode])
        statuses[status] = statuses.get(status, 0) + 1
        if status not in (SOME_ROWS_FAILED, CANNOT_RUN, INTERRUPTED, -signal.SIGKILL):
            problems.append(f"point {point}: exit status {status}")
        again, _ = in_child(folder, library, 0, MODES["fail"])
        if again != SOME_ROWS_FAILED or outcome(folder) != expected:
            problems.append(f"point {point}: not the same after going on (status {again})")
        else:
            shutil.rmtree(folder)
    report = {"operations": num_operations, "points": num_points}
    text = json.dumps(report | {"statuses": statuses, "problems": problems})
    os.write(report_fd, text.encode())


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
