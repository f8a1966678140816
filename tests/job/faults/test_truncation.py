"""A job whose files lost their last bytes goes on to the same end."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from batchwright.job import journal
from batchwright.job.directory import JobDirectory
from batchwright.job.run_job import JobPaths, run_job
from batchwright.job.runner import JobOptions
from tests.job.fakes import FakeEngine, FakeModel, chat_row, read_lines, read_rows, write_lines

JOB = "out.jsonl.job"
NUM_BYTES = 9000  # the last transaction of the write-ahead log has two or three pages of 4 KiB


def go(folder: Path, engine: FakeEngine) -> None:
    directory = JobDirectory(folder / JOB)
    try:
        run_job(
            read_rows(folder / "in.jsonl"),
            JobPaths(str(folder / "out.jsonl"), str(folder / "out.errors.jsonl")),
            directory,
            FakeModel(engine),
            JobOptions(model_name="m", created=5),
        )
    finally:
        directory.close()


def outcome(folder: Path) -> tuple[list[Any], list[Any]]:
    lines = read_lines(folder / "out.jsonl")
    errors = read_lines(folder / "out.errors.jsonl")
    return sorted(lines, key=lambda line: line["custom_id"]), errors


@pytest.fixture
def crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """The files of a job as a crash in its middle leaves them, and how the job should end."""
    monkeypatch.setattr(journal, "MAX_PENDING_ROWS", 2)
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    calm.mkdir()
    rows = [chat_row(f"r{i}", "x" * i, max_tokens=1 + i % 3) for i in range(9)]
    write_lines(calm / "in.jsonl", [*rows, chat_row("hot", temperature="hot")])

    def on_step(number: int) -> None:
        if number == 5:
            shutil.copytree(calm, broken)

    go(calm, FakeEngine(max_running=3, on_step=on_step))
    assert 0 < len(read_lines(broken / "out.jsonl")) < len(rows)
    return broken, outcome(calm)


@pytest.mark.parametrize("name", ["results.jsonl", "journal.sqlite-wal", "journal.sqlite"])
@pytest.mark.parametrize(
    "stride", [211, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_any_number_of_bytes_may_be_missing_at_the_end(
    crashed: tuple[Path, Any], tmp_path: Path, name: str, stride: int
) -> None:
    broken, expected = crashed
    size = (broken / JOB / name).stat().st_size
    num_cuts = 0
    for num_missing in range(1, min(size, NUM_BYTES) + 1, stride):
        folder = tmp_path / "again"
        shutil.copytree(broken, folder)
        with (folder / JOB / name).open("r+b") as file:
            file.truncate(size - num_missing)
        go(folder, FakeEngine(max_running=3))
        assert outcome(folder) == expected, f"{num_missing} bytes of {name} missing"
        shutil.rmtree(folder)
        num_cuts += 1
    print(f"{name}: {num_cuts} cuts of {size} bytes")
