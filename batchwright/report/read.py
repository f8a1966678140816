"""read_job: a job directory as one record, while the job runs and long after.

It only reads, and takes what is there: lines cut off by a crash, runs that were killed, files that
are missing. No prompt or answer is read; of failed rows, the code of their error.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from batchwright.errors import ConfigError, OutputError
from batchwright.job.directory import (
    SUFFIX,
    job_directory_for,
    printable_name,
    running_process,
)
from batchwright.job.journal import RowState, count_states, read_only
from batchwright.job.metrics import RunStart, Sample

MAX_SAMPLES = 2048  # of a run; a longer one is thinned out evenly
MAX_NUMBER = 1e18  # larger ones are damage

_FAILURES = (RowState.FAILED.value, RowState.EXPIRED.value)


class JobState(StrEnum):
    """What becomes of a job at the moment."""

    STARTING = "starting"  # a process works on it and has not begun to run rows
    RUNNING = "running"
    FINISHED = "finished"  # every row of the input has ended
    STOPPED = "stopped"  # somebody asked it to
    BROKEN_OFF = "broken off"  # killed, or a file or the memory failed; or its journal is damaged


@dataclass(slots=True)
class Run:
    """One run of a job: from a start to an end, a stop or a crash.

    Attributes:
        start: its first line; made up if that is lost.
        samples: its other lines, thinned out if there are many; the last one is always there.
    """

    start: RunStart = field(default_factory=RunStart)
    samples: list[Sample] = field(default_factory=list)
    _stride: int = 1
    _num_seen: int = 0
    _is_last_extra: bool = False

    @property
    def last(self) -> Sample:
        """The last line; an empty one if there is none."""
        return self.samples[-1] if self.samples else Sample()

    def add(self, sample: Sample) -> None:
        """Take the next line in."""
        if self._is_last_extra:
            self.samples.pop()
        self._is_last_extra = self._num_seen % self._stride != 0
        self._num_seen += 1
        self.samples.append(sample)
        if len(self.samples) > 2 * MAX_SAMPLES:
            del self.samples[1::2]
            self._stride *= 2


@dataclass(frozen=True, slots=True)
class JobRecord:
    """All that is known of a job.

    Attributes:
        name: its output, without folders.
        directory: where it keeps its state.
        runs: in order; empty if none has begun.
        rows: committed rows by state, of all runs.
        error_codes: the same that failed or expired, by code.
        rows_are_known: the journal could be read.
        process: who works on it now, as in "pid 4711".
        num_damaged_lines: lines of metrics.jsonl that could not be read.
    """

    name: str
    directory: Path
    runs: list[Run]
    rows: dict[str, int]
    error_codes: Counter[str]
    rows_are_known: bool
    process: str | None
    num_damaged_lines: int

    @property
    def state(self) -> JobState:
        """What becomes of the job."""
        run = self.runs[-1] if self.runs else Run(samples=[Sample(event="error")])
        if self.process is not None:
            if self.process != f"pid {run.start.pid}":  # it has not come to its first line
                return JobState.STARTING
            if run.last.event is None:
                return JobState.RUNNING
        if run.last.stopped:
            return JobState.STOPPED
        is_whole = run.last.event == "end" and self.rows_are_known
        return JobState.FINISHED if is_whole else JobState.BROKEN_OFF


def find_job(path: str | Path) -> Path:
    """The job directory that a user means: the directory itself, or the output it belongs to.

    Raises:
        ConfigError: there is no job.
    """
    if not str(path):
        raise ConfigError("the job's name is empty; give its output, or its directory OUT.job")
    given, beside = Path(path), job_directory_for(path)
    if given.name in ("", ".."):  # its name is the job's
        given = given.resolve()
    for directory in (given, beside):
        try:
            if directory.is_dir() and (directory / "lock").exists():
                return directory
        except (OSError, ValueError) as error:  # no permission; a name that no file can have
            raise ConfigError(f"cannot look at {directory}: {error}") from None
    raise ConfigError(
        f"there is no job at {path}: neither {beside} nor {given} is a job directory; give the "
        "output that was named with -o, or its directory OUT.job"
    )


def read_job(directory: Path) -> JobRecord:
    """Read a job directory.

    Raises:
        OutputError: its log cannot be opened.
    """
    process = running_process(directory)  # first: what it writes meanwhile is then the newer
    runs, num_damaged = _read_metrics(directory / "metrics.jsonl")
    rows = _read_rows(directory)
    return JobRecord(
        name=printable_name(directory.name.removesuffix(SUFFIX)),
        directory=directory,
        runs=runs,
        rows=rows.counts,
        error_codes=rows.error_codes,
        rows_are_known=rows.are_known,
        process=process,
        num_damaged_lines=num_damaged,
    )


def _read_metrics(path: Path) -> tuple[list[Run], int]:
    """(runs, number of damaged lines)"""
    runs: list[Run] = []
    num_damaged = 0
    for data in _lines(path):
        try:
            line = _decode(data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            num_damaged += bool(data.strip())
            continue
        if isinstance(line, RunStart):
            runs.append(Run(line))
            continue
        if not runs or runs[-1].last.event is not None:  # the first line of its run is lost
            runs.append(Run(RunStart(time=line.time - line.t_s)))
        runs[-1].add(line)
    return runs, num_damaged


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}") from error


def _decode(data: bytes) -> RunStart | Sample:
    values: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
    if not _is_plausible(values):
        raise msgspec.ValidationError("a number is out of all bounds")
    if values.get("event") == "start":
        return msgspec.convert(values, RunStart)
    return msgspec.convert(values, Sample)


def _is_plausible(value: Any) -> bool:
    """Whether all numbers in it are such that arithmetic works."""
    if isinstance(value, dict):
        return all(map(_is_plausible, value.values()))
    if isinstance(value, list):
        return all(map(_is_plausible, value))
    return not isinstance(value, int | float) or abs(value) < MAX_NUMBER


class _Rows(NamedTuple):
    """Committed rows by state, and those that failed or expired by code."""

    counts: dict[str, int]
    error_codes: Counter[str]
    are_known: bool


def _read_rows(directory: Path) -> _Rows:
    """What the journal tells.

    The database is held for two short queries only: a reader may hold up the writer.
    """
    path = directory / "journal.sqlite"
    nothing = _Rows({state.value: 0 for state in RowState}, Counter(), are_known=False)
    if not path.exists() or not path.stat().st_size:  # being made this instant
        return nothing
    try:
        with contextlib.closing(read_only(directory)) as sql:
            counts = {state.value: count for state, count in count_states(sql).items()}
            places = sql.execute(
                "SELECT offset, length FROM rows WHERE state IN (?, ?)", _FAILURES
            ).fetchall()
    except (OutputError, sqlite3.Error):
        return nothing
    return _Rows(counts, _error_codes(directory / "results.jsonl", places), are_known=True)


class _Error(msgspec.Struct):
    code: str = "unknown"


class _ErrorLine(msgspec.Struct):
    error: _Error | None = None


def _error_codes(path: Path, places: list[tuple[int, int]]) -> Counter[str]:
    codes: Counter[str] = Counter()
    decoder = msgspec.json.Decoder(_ErrorLine)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return codes
    try:
        for offset, length in places:
            try:
                line = decoder.decode(os.pread(fd, length, offset))
            except (msgspec.MsgspecError, UnicodeError, RecursionError):
                line = _ErrorLine()
            codes[(line.error or _Error()).code] += 1
    finally:
        os.close(fd)
    return codes
