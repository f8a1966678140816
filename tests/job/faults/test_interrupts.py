"""Ctrl-C between any two lines of the job's own code, as Python delivers it without a handler."""

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from batchwright.job import journal
from batchwright.job.file_job import run_file
from batchwright.job.stop import StoppedAtOnce
from tests.job.fakes import FakeEngine, FakeModel, chat_row, read_lines

# Where rows change hands. Elsewhere there is nothing that an interrupt could leave half done.
FILES = {"journal.py", "runner.py", "output_files.py"}


class InterruptAt:
    """Raises at the Nth line that runs in one of FILES; counts them all if N is 0."""

    def __init__(self, number: int, kind: type[KeyboardInterrupt]) -> None:
        self.number, self.kind, self.count = number, kind, 0

    def __enter__(self) -> "InterruptAt":
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        is_ours = path.parent.name == "job" and path.name in FILES
        return self._line if is_ours and frame.f_code.co_name != "close" else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        # A `with` line also runs when its block is left, where Python delivers no signal.
        if event == "line" and not source.startswith("with "):
            self.count += 1
            if self.count == self.number:
                raise self.kind
        return self._line


def go(folder: Path) -> None:
    rows = [*(chat_row(f"r{i}", "x" * i, max_tokens=1 + i % 3) for i in range(6)), {"prompt": 1}]
    run_file(FakeModel(FakeEngine(max_running=3), name="m"), rows, folder / "out.jsonl")


def outcome(folder: Path) -> list[Any]:
    lines = read_lines(folder / "out.jsonl") + read_lines(folder / "out.errors.jsonl")
    for line in lines:
        (line["response"] or {"body": {}})["body"].pop("created", None)
    return sorted(lines, key=lambda line: line["custom_id"])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, StoppedAtOnce])
@pytest.mark.parametrize(
    "stride", [23, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_an_interrupt_anywhere_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[KeyboardInterrupt], stride: int
) -> None:
    monkeypatch.setattr(journal, "MAX_PENDING_ROWS", 2)
    calm = tmp_path / "calm"
    calm.mkdir()
    with InterruptAt(0, kind) as all_lines:
        go(calm)
    expected = outcome(calm)
    assert len(expected) == 7
    num_hit = 0
    for number in range(1, all_lines.count, stride):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            with InterruptAt(number, kind):
                go(folder)
        except KeyboardInterrupt:
            num_hit += 1
        go(folder)
        assert outcome(folder) == expected, f"interrupted at line {number}"
    print(f"{kind.__name__}: {all_lines.count} lines, {num_hit} interrupts passed on")
    assert num_hit > 5
