"""`batchwright run` with an engine that is faked: what it answers is known in advance.

As a process: `python -m tests.job.faults.fake_command STEP_S run IN -o OUT --model m`, where a step
takes STEP_S seconds. From Python: `main`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchwright.cli import main as cli
from batchwright.cli import run as run_command
from batchwright.job import journal
from batchwright.weights import locate
from tests.job.fakes import FakeEngine, FakeModel, chat_row, read_lines

ROOT = Path(__file__).parents[3]


def main(arguments: list[str], on_step: Callable[[int], None] = lambda number: None) -> int:
    """Run the command in this process, which is its own; returns the exit status."""
    journal.MAX_PENDING_ROWS = 2  # many commits in a small job
    engine = FakeEngine(max_running=3, refuse=["refused"], on_step=on_step)
    run_command.load = lambda model, settings: FakeModel(engine, name=model)  # type: ignore
    locate.locate_model = lambda model: Path(model)  # type: ignore[assignment]
    sys.argv = ["batchwright", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def arguments(folder: Path) -> list[str]:
    """The command's, for the job in a folder: in.jsonl to out.jsonl."""
    return ["run", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--model", "m"]


def start(folder: Path, *, step_s: float = 0.0, **options: Any) -> subprocess.Popen[str]:
    """Start it as a process."""
    command = [sys.executable, "-m", "tests.job.faults.fake_command", str(step_s)]
    return subprocess.Popen(
        [*command, *arguments(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit status, what was said) of a started command."""
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, out + err


def rows() -> list[Any]:
    """Sound rows of several lengths, and three bad ones."""
    good = [chat_row(f"r{i}", "x" * i, max_tokens=1 + i % 3, n=1 + i % 2) for i in range(9)]
    return [*good, b"{broken", chat_row("hot", temperature="hot"), chat_row("refused")]


def outcome(folder: Path) -> dict[str, list[Any]]:
    """What the files say, without the order in which rows ended and the time."""
    lines = read_lines(folder / "out.jsonl")
    errors = folder / "out.errors.jsonl"
    for line in lines:
        del line["response"]["body"]["created"]
    return {
        "succeeded": sorted(lines, key=lambda line: line["custom_id"]),
        "failed": sorted(
            read_lines(errors) if errors.exists() else [], key=lambda line: line["error"]["line"]
        ),
    }


def sleep(seconds: float) -> None:
    """Sleep in slices: a signal may reach another thread, and wakes this one only in between."""
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(left_s, 0.02))


if __name__ == "__main__":
    wait_s = float(sys.argv[1])
    sys.exit(main(sys.argv[2:], lambda number: sleep(wait_s)))
