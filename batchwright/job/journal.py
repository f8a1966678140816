"""The journal: which rows have ended, and where their lines are.

Two files. `results.jsonl` is append-only and holds the final line of every row, success or error.
`journal.sqlite` says which rows are done and where their lines lie. A row counts as done when both
have it: lines are appended, the file is synced, and then one transaction (synchronous=FULL) names
them all. What is in the file beyond the last transaction was never promised to anybody, and is cut
off at the next start. A row that is run again gets a new line; its old one is left as a hole.

    append ... append, commit:  write lines │ fsync │ INSERT rows, end │ COMMIT
    a crash here:               └ cut ──────┴ cut ──┴ cut (rolled back) ┴ kept

Nothing else is state: the output files are projections of the journal and can be made again. Should
a disk lose what it had promised, a shortened results file costs the rows it lost, and a damaged
database is made again from the lines.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from batchwright.errors import OutputError
from batchwright.job.durable import sync_directory, write_all

logger = logging.getLogger(__name__)

MAX_PENDING_ROWS = 256
MAX_PENDING_S = 1.0

_UNNAMED, _ESCAPE = "\0", "\1"  # how ids that are not a plain custom_id begin
ANY_CONTENT = b""  # the digest of a row that was made again from its line
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    id TEXT PRIMARY KEY, line INTEGER NOT NULL, state TEXT NOT NULL, digest BLOB NOT NULL,
    offset INTEGER NOT NULL, length INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS results (end INTEGER NOT NULL);
"""
_LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs"}


class RowState(StrEnum):
    """How a row ended. Cancelled rows are not in the journal: they run again."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    EXPIRED = "expired"


class Entry(NamedTuple):
    """A row that has ended.

    Attributes:
        id: `named_row(custom_id)` or `unnamed_row(line)`.
        line: 1-based line of the input it came from.
        state: how it ended.
        digest: identifies the content it was answered for; ANY_CONTENT if that is not known.
        offset, length: its line in results.jsonl, in bytes, newline included.
    """

    id: str
    line: int
    state: RowState
    digest: bytes
    offset: int
    length: int


def named_row(custom_id: str) -> str:
    """The journal's id of a row with a custom_id of its own."""
    return _ESCAPE + custom_id if custom_id.startswith((_UNNAMED, _ESCAPE)) else custom_id


def unnamed_row(line: int) -> str:
    """The journal's id of a row that has no custom_id, or another row's."""
    return f"{_UNNAMED}line-{line}"


class Journal:
    """The journal of the job in `directory`, opened for writing; one thread uses it.

    Args:
        directory: an existing directory, locked by this process.
        now: the clock, in seconds.
    Raises:
        OutputError: the files cannot be opened or are damaged.
    """

    def __init__(self, directory: Path, *, now: Callable[[], float] = time.monotonic) -> None:
        self._path = directory / "results.jsonl"
        self._now = now
        self._pending: list[tuple[Entry, bytes]] = []
        self._pending_since_s = 0.0
        with _explained(directory):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._sql = _connect_or_rebuild(directory)
            self._end = int(self._sql.execute("SELECT end FROM results").fetchone()[0])
            if (size := os.fstat(self._fd).st_size) < self._end:
                self._end = self._forget_beyond(size)
            os.ftruncate(self._fd, self._end)
            sync_directory(directory)

    @property
    def results_path(self) -> Path:
        """Where the lines are."""
        return self._path

    def append(self, id: str, line: int, state: RowState, digest: bytes, data: bytes) -> None:
        """Note the end of a row; it is durable after the next `commit`.

        Args:
            data: its final line, newline included.
        """
        if not self._pending:
            self._pending_since_s = self._now()
        entry = Entry(id, line, state, digest, self._pending_end(), len(data))
        self._pending.append((entry, data))  # one act: an interrupt comes before or after it

    @property
    def is_due(self) -> bool:
        """Whether enough rows or time have passed for a `commit`."""
        return bool(self._pending) and (
            len(self._pending) >= MAX_PENDING_ROWS
            or self._now() - self._pending_since_s >= MAX_PENDING_S
        )

    def commit(self) -> list[tuple[Entry, bytes]]:
        """Make all appended rows durable; returns them with their lines.

        A commit that was interrupted may be made again.

        Raises:
            OutputError: the disk is full or fails. What was committed before stays; the rows of
                this commit will be run again.
        """
        if not self._pending:
            return []
        committed, end = self._pending, self._pending_end()
        with _explained(self._path):
            os.lseek(self._fd, committed[0][0].offset, os.SEEK_SET)
            write_all(self._fd, b"".join(data for _, data in committed))
            os.fsync(self._fd)
            with self._sql:  # one transaction
                self._sql.executemany(
                    "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?)",
                    [entry for entry, _ in committed],
                )
                self._sql.execute("UPDATE results SET end = ?", (end,))
        self._end = end  # first: an interrupt here means that the same commit is made again
        self._pending = []
        return committed

    def _pending_end(self) -> int:
        """Where the next line will begin."""
        if not self._pending:
            return self._end
        last = self._pending[-1][0]
        return last.offset + last.length

    def forget_unnamed(self) -> None:
        """Drop errors of rows without an id: the input is read again and may have changed."""
        with _explained(self._path), self._sql:
            self._sql.execute("DELETE FROM rows WHERE id >= ? AND id < ?", (_UNNAMED, _ESCAPE))

    def counts(self) -> dict[RowState, int]:
        """Committed rows by state."""
        return count_states(self._sql)

    def lines(
        self, states: Sequence[RowState], *, in_input_order: bool = False
    ) -> Iterator[tuple[Entry, bytes]]:
        """Committed rows of these states with their lines: as they ended, or as they were read."""
        return stored_lines(self._sql, self._fd, states, in_input_order=in_input_order)

    def close(self) -> None:
        """Close the files. What was appended and not committed is lost."""
        self._sql.close()
        os.close(self._fd)

    def _forget_beyond(self, size: int) -> int:
        """The results file lost its end: forget the rows whose lines are gone; returns its end."""
        with self._sql:
            num_lost = self._sql.execute(
                "DELETE FROM rows WHERE offset + length > ?", (size,)
            ).rowcount
            found = self._sql.execute("SELECT MAX(offset + length) FROM rows").fetchone()
            end = found[0] or 0
            self._sql.execute("UPDATE results SET end = ?", (end,))
        logger.warning("%s lost its end; %d rows will be run again", self._path, num_lost)
        return int(end)


class FinishedRows:
    """Which rows an earlier run has finished: a view of the journal for another thread.

    Args:
        directory: the job's directory.
        states: the states that count as finished.
        looks_only: the journal is not open in this process, and is not to be written.
    """

    def __init__(
        self,
        directory: Path,
        states: Sequence[RowState] = (RowState.SUCCEEDED,),
        *,
        looks_only: bool = False,
    ) -> None:
        if looks_only:
            self._sql = read_only(directory)
        else:
            self._sql = sqlite3.connect(directory / "journal.sqlite", check_same_thread=False)
        self._states = tuple(states)
        marks = ", ".join("?" * len(self._states))
        self.is_empty = not self._sql.execute(
            f"SELECT 1 FROM rows WHERE state IN ({marks}) LIMIT 1", self._states
        ).fetchone()

    def among(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Those of the ids that are finished, with the digest of what they were answered for."""
        if self.is_empty or not ids:
            return {}
        marks, states = ", ".join("?" * len(ids)), ", ".join("?" * len(self._states))
        found = self._sql.execute(
            f"SELECT id, digest FROM rows WHERE id IN ({marks}) AND state IN ({states})",
            (*ids, *self._states),
        )
        return dict(found.fetchall())

    def close(self) -> None:
        """Close the view."""
        self._sql.close()


def connect(directory: Path) -> sqlite3.Connection:
    """The journal's database, made if it is not there; every commit is on the disk."""
    path = directory / "journal.sqlite"
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # private from the start
    sql = sqlite3.connect(path, isolation_level="IMMEDIATE")
    # Write-ahead logs need shared memory, which network file systems do not have.
    mode = "WAL" if file_system(directory) in _LOCAL_FILE_SYSTEMS else "TRUNCATE"
    sql.execute(f"PRAGMA journal_mode={mode}")
    sql.execute("PRAGMA synchronous=FULL")
    # Ids in no order change pages all over the table: writing them back every 32 MB of log, not
    # every 4 MB, saves a fifth of a commit.
    sql.execute("PRAGMA wal_autocheckpoint=8000")
    sql.executescript(_SCHEMA)
    return sql


def _connect_or_rebuild(directory: Path) -> sqlite3.Connection:
    """The database; if it is new or damaged it is filled from the lines of the results file."""
    sql = _connect_if_sound(directory)
    if sql is None:
        for path in directory.glob("journal.sqlite*"):
            path.unlink()
        sql = connect(directory)
    if sql.execute("SELECT end FROM results").fetchone() is None:
        rows, end = _rows_of_lines(directory / "results.jsonl")
        with sql:
            sql.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?)", rows)
            sql.execute("INSERT INTO results VALUES (?)", (end,))
    return sql


def _connect_if_sound(directory: Path) -> sqlite3.Connection | None:
    sql = None
    try:
        sql = connect(directory)
        reason = str(sql.execute("PRAGMA quick_check(1)").fetchone()[0])
        if reason == "ok":
            return sql
    except sqlite3.OperationalError:
        raise  # a full disk, a lock, a permission: nothing is damaged
    except sqlite3.DatabaseError as error:
        reason = str(error)
    if sql is not None:
        sql.close()
    logger.warning("%s is damaged (%s); it is made again", directory / "journal.sqlite", reason)
    return None


def _rows_of_lines(path: Path) -> tuple[list[Entry], int]:
    """The rows that the whole lines of a results file tell of, and where those lines end.

    What a line does not tell is left open: the content that was asked for, and the order of
    the input, for which that of the lines stands.
    """
    rows: list[Entry] = []
    offset = 0
    with open(path, "rb") as file:
        for number, data in enumerate(file, start=1):
            try:
                line = msgspec.json.decode(data) if data.endswith(b"\n") else None
            except msgspec.DecodeError:
                line = None
            if not isinstance(line, dict):
                break
            error = line.get("error")
            if error is None and isinstance(line.get("custom_id"), str):
                id = named_row(line["custom_id"])
                rows.append(Entry(id, number, RowState.SUCCEEDED, ANY_CONTENT, offset, len(data)))
            offset += len(data)
    return rows, offset


def read_only(directory: Path) -> sqlite3.Connection:
    """The journal's database for looking at a job, which may be running.

    Raises:
        OutputError: there is none, or it cannot be read.
    """
    path = directory / "journal.sqlite"
    try:
        sql = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False
        )
        sql.execute("SELECT 1 FROM rows LIMIT 1").fetchone()
    except sqlite3.Error as error:
        raise OutputError(f"cannot read {path}: {error}; is {directory} a job directory?") from None
    return sql


def count_states(sql: sqlite3.Connection) -> dict[RowState, int]:
    """Committed rows by state."""
    counts = dict(sql.execute("SELECT state, COUNT(*) FROM rows GROUP BY state").fetchall())
    return {state: counts.get(state.value, 0) for state in RowState}


def stored_lines(
    sql: sqlite3.Connection, fd: int, states: Sequence[RowState], *, in_input_order: bool
) -> Iterator[tuple[Entry, bytes]]:
    """Committed rows of some states with their lines, read from the open results.jsonl."""
    marks = ", ".join("?" * len(states))
    order = "line, offset" if in_input_order else "offset"
    rows = sql.execute(
        f"SELECT id, line, state, digest, offset, length FROM rows WHERE state IN ({marks}) "
        f"ORDER BY {order}",
        [state.value for state in states],
    )
    for id, line, state, digest, offset, length in rows:
        data = os.pread(fd, length, offset)
        yield Entry(id, line, RowState(state), digest, offset, length), data


def file_system(path: Path) -> str:
    """The type of the file system a path lies on, "" if it cannot be told."""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    best, found = -1, ""
    real = os.path.realpath(path)
    for fields in (line.split() for line in mounts):
        mount = fields[1].encode().decode("unicode_escape")
        prefix = mount.rstrip("/") + "/"
        if (real + "/").startswith(prefix) and len(prefix) >= best:
            best, found = len(prefix), fields[2]
    return found


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"cannot keep the journal of {path}: {reason}; rows committed before are safe, and "
            "the same command goes on from there"
        ) from error
