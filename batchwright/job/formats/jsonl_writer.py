"""Writing result lines: `{"id", "custom_id", "response", "error"}`, one row a line.

Each line reaches the operating system in one write before the next row is finished, so a job that
is stopped leaves whole lines. Results may be private: files are readable by their owner only.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec

from batchwright.errors import OutputError, RequestError
from batchwright.job.answer import response_id

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_encode = msgspec.json.Encoder().encode


class JsonlWriter:
    """A file of JSON lines, created when the first line is written.

    Args:
        path: the file; `-` is standard output.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.num_lines = 0
        self._fd: int | None = None

    def write(self, line: dict[str, Any]) -> None:
        """Write one line.

        Raises:
            OutputError: the file cannot be created or written (no space, no permission).
        """
        data = _encode(line) + b"\n"
        self.open()
        assert self._fd is not None
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror or error}; "
                f"{self.num_lines} lines were written before"
            ) from error
        self.num_lines += 1

    def open(self) -> None:
        """Create the file, or empty it; nothing if it is open already.

        Raises:
            OutputError: it cannot be created.
        """
        if self._fd is not None:
            return
        if self.path == "-":
            self._fd = os.dup(1)
            return
        try:
            self._fd = os.open(self.path, _FLAGS, 0o600)
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                os.fchmod(self._fd, 0o600)
        except OSError as error:
            raise OutputError(f"cannot create {self.path}: {error.strerror or error}") from error

    def remove(self) -> None:
        """Delete what an earlier run left at the path.

        Raises:
            OutputError: it cannot be deleted.
        """
        try:
            if os.path.isfile(self.path):
                os.unlink(self.path)
        except OSError as error:
            raise OutputError(f"cannot replace {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file; nothing if it was never opened."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def success_line(
    custom_id: str, body: dict[str, Any], columns: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The output line of a row that succeeded; `columns` are those that pass through."""
    request_id = response_id(custom_id)
    line: dict[str, Any] = {
        "id": f"batch_req_{request_id}",
        "custom_id": custom_id,
        "response": {"status_code": 200, "request_id": f"req_{request_id}", "body": body},
        "error": None,
    }
    return line if columns is None else {**line, "columns": columns}


def error_line(
    custom_id: str | None,
    line: int,
    error: RequestError,
    columns: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The error-file line of a row that failed; custom_id is None if it could not be read."""
    request_id = response_id(custom_id if custom_id is not None else f"line-{line}")
    failure: dict[str, Any] = {
        "id": f"batch_req_{request_id}",
        "custom_id": custom_id,
        "response": None,
        "error": {
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "line": line,
        },
    }
    return failure if columns is None else {**failure, "columns": columns}
