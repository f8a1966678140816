"""The job directory `OUT.job/`: everything a job needs to go on after it was broken off.

    lock            held by the process that works on the job
    manifest.json   what answers depend on; another value on resume is refused
    results.jsonl   final lines, appended as rows end
    journal.sqlite  which line of results.jsonl is whose (see `journal.py`)
    metrics.jsonl   progress, one line per interval (see `metrics.py`)
    summary.json    what became of the rows, when the job ended or was stopped
    error_file      where failures go

All of it is readable by its owner only: results may be private.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from pathlib import Path

from batchwright.errors import ConfigError, OutputError
from batchwright.job.durable import write_private
from batchwright.job.formats.source import is_url

SUFFIX = ".job"
LOCK_PATIENCE_S = 0.4

_FILES = (
    "manifest.json",
    "results.jsonl",
    "journal.sqlite",
    "metrics.jsonl",
    "summary.json",
    "error_file",
)


def job_directory_for(output: str | Path) -> Path:
    """Where the job that writes `output` keeps its state: results.jsonl has results.jsonl.job.

    A journal cannot lie in an object store. The job of a URL lies in the working directory, named
    by the URL's last part and a digest of all of it, so that no two URLs share a job.
    """
    path = str(output)
    if is_url(path):
        digest = hashlib.blake2b(path.encode(), digest_size=4).hexdigest()
        path = f"{path.rpartition('/')[2]}.{digest}"
    return Path(f"{path}{SUFFIX}")


def printable_name(path: str) -> str:
    """A path's last part as text that can be encoded; names of files may be any bytes."""
    return os.fsencode(os.path.basename(path)).decode("utf-8", "replace")


class JobDirectory:
    """A job directory, locked by this process until `close`.

    If it was made here and no job has begun in it by then, it is removed again.

    Args:
        path: created with mode 0700 if it is not there.
    Raises:
        ConfigError: another process works on the job, or the path is taken by something else.
        OutputError: it cannot be created.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open()
        while not self._is_there():  # whoever had it has removed it
            os.close(self._lock)
            self._open()
        self._name_holder()

    def _open(self) -> None:
        self._is_ours = not self.path.exists()
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise ConfigError(
                f"{self.path} is not a directory; remove it, or name another output"
            ) from None
        except OSError as error:
            raise OutputError(f"cannot create {self.path}: {error.strerror or error}") from error
        if not self._take_lock():
            holder = _holder(self._lock)
            os.close(self._lock)
            raise ConfigError(
                f"another process{f' ({holder})' if holder else ''} works on the job in "
                f"{self.path}; wait for it, stop it, or name another output"
            ) from None

    def _is_there(self) -> bool:
        """Whether the lock that we hold is the one that others will find."""
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(self.path / "lock"))
        except FileNotFoundError:
            return False

    def _take_lock(self) -> bool:
        """Whoever looks whether the job runs holds the lock for an instant: that is no refusal."""
        give_up_s = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= give_up_s:
                    return False
                time.sleep(LOCK_PATIENCE_S / 20)

    def _name_holder(self) -> None:
        """Write who holds the lock, for the message above; the lock holds without it."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"pid {os.getpid()}".encode(), 0)

    @property
    def manifest_path(self) -> Path:
        """The manifest; it exists once a job has started here."""
        return self.path / "manifest.json"

    @property
    def metrics_path(self) -> Path:
        """Progress lines."""
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """The last summary."""
        return self.path / "summary.json"

    @property
    def error_file(self) -> str | None:
        """Where the job that was begun here writes its failures; None: it has not noted it."""
        return error_file_of(self.path)

    def note_error_file(self, path: str) -> None:
        """Remember where failures go, as seen from here: a job may be moved with its files.

        Raises:
            OutputError: it cannot be written.
        """
        name = path if is_url(path) else os.path.relpath(path, self.path)
        write_private(self.path / "error_file", os.fsencode(name))

    def clear(self) -> None:
        """Forget the job: delete its files, so that it starts over.

        Raises:
            OutputError: a file cannot be deleted.
        """
        try:
            for name in _FILES:
                for path in self.path.glob(f"{name}*"):  # SQLite keeps files beside its own
                    path.unlink()
        except OSError as error:
            raise OutputError(f"cannot clear {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Let go of the lock."""
        with contextlib.suppress(OSError):  # somebody may have removed it already
            if self._is_ours and os.listdir(self.path) == ["lock"]:
                (self.path / "lock").unlink()
                self.path.rmdir()
        os.close(self._lock)

    def __enter__(self) -> JobDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def error_file_of(directory: Path) -> str | None:
    """Where the job that was begun in a directory writes its failures; None: not noted."""
    try:
        name = os.fsdecode((directory / "error_file").read_bytes())
    except OSError:
        return None
    return name if is_url(name) else os.path.normpath(os.path.join(directory, name))


def running_process(directory: Path) -> str | None:
    """Who works on a job now, as in "pid 4711"; None: nobody does.

    The lock is tried, shared and for an instant, which a job that starts meanwhile waits out. So
    the answer is right on every file system that has locks, and in containers that share one.
    """
    try:
        fd = os.open(directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(fd) or "another process"
    finally:
        os.close(fd)
    return None


def _holder(fd: int) -> str:
    """What `_name_holder` wrote."""
    return os.pread(fd, 32, 0).decode("ascii", "replace").strip()
