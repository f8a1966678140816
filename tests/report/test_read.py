"""Reading job directories, whole and damaged."""

import sqlite3
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from batchwright.cli.status import status_lines
from batchwright.errors import ConfigError, OutputError
from batchwright.job.directory import JobDirectory
from batchwright.job.journal import Journal
from batchwright.job.metrics import RunStart, Sample
from batchwright.report.ceiling import Ceiling
from batchwright.report.make_report import make_report
from batchwright.report.read import MAX_SAMPLES, JobState, Run, find_job, read_job
from batchwright.report.status import job_status
from tests.report.made import KILLED_RUN, WHOLE_RUN, make_job, write_metrics


def test_two_runs_one_of_them_killed(tmp_path: Path) -> None:
    directory = make_job(
        tmp_path, [*KILLED_RUN, *WHOLE_RUN], num_succeeded=9, errors=["b", "a", "b"]
    )
    record = read_job(directory)
    assert record.name == "results.jsonl"
    assert [len(run.samples) for run in record.runs] == [2, 1]
    assert record.rows == {"succeeded": 9, "failed": 3, "expired": 0}
    assert record.error_codes == {"b": 2, "a": 1}
    assert record.state is JobState.FINISHED
    assert record.process is None
    assert record.num_damaged_lines == 0


def test_torn_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    start, *samples = KILLED_RUN
    torn = msgspec.json.encode(samples[1])[:-9]
    lines = [start, samples[0], b'"text"\n', b"\xff\xfe\n", b"\n", b'{"t_s": "x"}\n', torn]
    record = read_job(make_job(tmp_path, lines))
    assert [sample.t_s for run in record.runs for sample in run.samples] == [1.0]
    assert record.num_damaged_lines == 4
    assert record.state is JobState.BROKEN_OFF


def test_every_cut_of_the_file_can_be_read(tmp_path: Path) -> None:
    directory = make_job(tmp_path, [*KILLED_RUN, *WHOLE_RUN])
    data = (directory / "metrics.jsonl").read_bytes()
    for size in range(0, len(data), 7):
        (directory / "metrics.jsonl").write_bytes(data[:size])
        record = read_job(directory)
        assert len(record.runs) <= 2
        assert record.num_damaged_lines <= 1


def test_a_run_whose_first_line_is_lost(tmp_path: Path) -> None:
    record = read_job(make_job(tmp_path, [*KILLED_RUN[1:], *WHOLE_RUN[1:]]))
    (run,) = record.runs  # nothing tells the second from the first
    assert run.start.time == 1000.0
    record = read_job(make_job(tmp_path, [*WHOLE_RUN, *KILLED_RUN[1:]]))
    assert len(record.runs) == 2


def test_lines_of_other_versions(tmp_path: Path) -> None:
    lines = [b'{"event": "start", "new": {}}\n', b'{"t_s": 1.5, "newer": [1], "steps": 3}\n']
    (run,) = read_job(make_job(tmp_path, lines)).runs
    assert (run.last.t_s, run.last.steps, run.last.rows_read) == (1.5, 3, 0)


@pytest.mark.parametrize("name", ["metrics.jsonl", "journal.sqlite", "results.jsonl"])
@pytest.mark.parametrize("damage", ["gone", "empty", "noise"])
def test_missing_and_damaged_files(tmp_path: Path, name: str, damage: str) -> None:
    directory = make_job(tmp_path, WHOLE_RUN, num_succeeded=2, errors=["x"])
    for path in directory.glob(f"{name}*"):
        path.unlink()
    if damage != "gone":
        (directory / name).write_bytes(b"" if damage == "empty" else b"noise" * 1000)
    record = read_job(directory)
    assert record.name == "results.jsonl"
    if name == "metrics.jsonl":
        assert record.runs == []
        assert record.rows["succeeded"] == 2
    if name == "journal.sqlite":
        assert sum(record.rows.values()) == 0
        assert record.state is JobState.BROKEN_OFF  # the same command mends it
    if name == "results.jsonl":
        assert record.rows["failed"] == 1
        assert set(record.error_codes) <= {"unknown"}


def test_a_log_that_is_no_file_or_says_the_impossible(tmp_path: Path) -> None:
    counted = Sample(t_s=1e17, keys=[1, 2, 3], time=-1e17)
    lines = [RunStart(time=1e17), counted, b'{"a": "\xff"}\n', b'{"steps": 1e308}\n']
    record = read_job(make_job(tmp_path, lines))
    assert record.num_damaged_lines == 2
    assert make_report(record, Ceiling(1e9, 1e9)).roofline is None
    assert "unknown" in "".join(status_lines(job_status(record, 0.0), 0.0))
    path = record.directory / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        read_job(record.directory)


def test_a_directory_that_may_not_be_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    make_job(tmp_path, [])
    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ConfigError, match=r"cannot look at .*Permission denied"):
        find_job(tmp_path / "results.jsonl")


def test_states(tmp_path: Path) -> None:
    directory = make_job(tmp_path, [])
    assert read_job(directory).state is JobState.BROKEN_OFF
    with JobDirectory(directory):
        holder = int((directory / "lock").read_text().removeprefix("pid "))
        assert read_job(directory).state is JobState.STARTING
        write_metrics(directory, KILLED_RUN)  # an earlier process's
        assert read_job(directory).state is JobState.STARTING
        write_metrics(directory, [*KILLED_RUN, RunStart(pid=holder)])
        assert read_job(directory).state is JobState.RUNNING
        write_metrics(directory, [RunStart(pid=holder), Sample(t_s=1.0)])
        assert read_job(directory).state is JobState.RUNNING
    assert read_job(directory).state is JobState.BROKEN_OFF
    write_metrics(directory, [RunStart(), Sample(stopped=True, event="end")])
    assert read_job(directory).state is JobState.STOPPED
    write_metrics(directory, [RunStart(), Sample(event="error")])
    assert read_job(directory).state is JobState.BROKEN_OFF


def test_a_long_run_is_thinned_out_and_keeps_its_last_line() -> None:
    run, num = Run(), 10 * MAX_SAMPLES + 3
    for second in range(num):
        run.add(Sample(t_s=float(second)))
        assert run.last.t_s == second
    assert len(run.samples) <= 2 * MAX_SAMPLES + 1
    times = [sample.t_s for sample in run.samples]
    assert times[0] == 0
    assert len({b - a for a, b in pairwise(times[:-1])}) == 1  # evenly


def test_reading_disturbs_no_writer(tmp_path: Path) -> None:
    directory = make_job(tmp_path, WHOLE_RUN, num_succeeded=1)
    with JobDirectory(directory):
        journal = Journal(directory)
        read_job(directory)
        with sqlite3.connect(directory / "journal.sqlite", timeout=0.1) as sql:
            sql.execute("UPDATE results SET end = end")
        sql.close()
        journal.close()


def test_finding_a_job(tmp_path: Path) -> None:
    directory = make_job(tmp_path, [])
    assert find_job(tmp_path / "results.jsonl") == directory
    assert find_job(directory) == directory
    (tmp_path / "results.jsonl").write_text("{}")
    assert find_job(tmp_path / "results.jsonl") == directory
    for other in (tmp_path, tmp_path / "nothing", tmp_path / "nothing.job"):
        with pytest.raises(ConfigError, match="there is no job at"):
            find_job(other)
