"""run_engine: one workload on one engine, in a process that begins and ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from batchwright.bench.workloads import WorkRequest

READY_S = 900.0
"""An engine that is not ready by then is given up."""

POLL_S = 0.2
STOP_S = 10.0
LONGEST_REASON = 300


class EngineRun(NamedTuple):
    """What an engine did with a workload.

    Attributes:
        ready_s: from the start of its process until it had answered a first short row.
        seconds: for all rows, from then on.
        token_ids: generated, by row.
        peak_bytes: most resident memory of its processes together, loading included; memory that
            two of them share counts twice.
        version, settings: as the engine tells.
        more: whatever else its runner tells.
    """

    ready_s: float
    seconds: float
    token_ids: list[list[int]]
    peak_bytes: int
    version: str
    settings: dict[str, Any]
    more: dict[str, Any]


class EngineFailure(Exception):
    """An engine gave no result.

    Attributes:
        was_ready: it had loaded, so another workload may do better.
    """

    def __init__(self, reason: str, *, was_ready: bool) -> None:
        super().__init__(reason)
        self.was_ready = was_ready


def write_job(
    folder: Path,
    requests: Sequence[WorkRequest],
    job: dict[str, Any],
    ours: list[list[int]] | None = None,
) -> None:
    """What a runner reads.

    Args:
        ours: what we have generated for these requests, if the runner is to compare.
    """
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for request in requests:
            file.write(f"{json.dumps([request.prompt_token_ids, request.num_output_tokens])}\n")
    if ours is not None:
        (folder / "ours.json").write_text(json.dumps(ours), encoding="utf-8")


def run_engine(
    command: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    *,
    longest_s: float,
    ready_s: float = READY_S,
) -> EngineRun:
    """Run a runner on the job in a folder, and see how much memory it takes.

    Args:
        longest_s: for the rows; then it is stopped.
        ready_s: for loading; then it is stopped.
    Raises:
        EngineFailure: it cannot be started, fails, or takes too long.
    """
    log = folder / "output.txt"
    started, peak_bytes = time.time(), 0
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                [*command, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # so that whatever it starts can be ended with it
            )
        except OSError as error:
            reason = f"cannot run {command[0]}: {error.strerror or error}"
            raise EngineFailure(reason, was_ready=False) from error
    try:
        ready = None
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _resident_bytes(process.pid))
            if ready is None and (folder / "loaded.json").exists():
                ready = time.monotonic()
            if (folder / "result.json").exists():
                break  # how long it takes to end does not matter
            if ready is None and time.time() - started > ready_s:
                raise EngineFailure(f"not ready after {ready_s:.0f} s", was_ready=False)
            if ready is not None and time.monotonic() - ready > longest_s:
                raise EngineFailure(f"not done after {longest_s:.0f} s", was_ready=True)
            time.sleep(POLL_S)
    finally:
        _end(process)
    was_ready = (folder / "loaded.json").exists()
    if not (folder / "result.json").exists():
        reason = f"ended with status {process.returncode}: {_last_words(log)}"
        raise EngineFailure(reason, was_ready=was_ready)
    loaded, result = _read(folder / "loaded.json"), _read(folder / "result.json")
    return EngineRun(
        ready_s=loaded["time"] - started,
        seconds=result.pop("seconds"),
        token_ids=result.pop("token_ids"),
        peak_bytes=peak_bytes,
        version=loaded["version"],
        settings=loaded["settings"],
        more=result,
    )


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants; 0 where the system does not tell."""
    total = 0
    with contextlib.suppress(OSError, IndexError, ValueError):  # it may end at any time
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        total += pages * os.sysconf("SC_PAGE_SIZE")
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                    total += _resident_bytes(int(child))
    return total


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:LONGEST_REASON] if lines else "it said nothing"
