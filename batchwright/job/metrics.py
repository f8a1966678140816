"""metrics.jsonl: how a job went, one line per interval, for `status`, `report` and dashboards.

Counts are cumulative since the start of the run; rows_running, rows_waiting, num_running_seqs and
kv_used_fraction are of the moment. No line holds text or ids of rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from batchwright.errors import OutputError
from batchwright.job.durable import write_all

INTERVAL_S = 1.0


class MetricsLog:
    """Appends to metrics.jsonl; the first line of a run says what runs where.

    Args:
        path: the file; earlier runs' lines stay.
        now, wall: clocks, in seconds since some moment and since 1970.
    """

    def __init__(self, path: Path, *, now: Callable[[], float], wall: Callable[[], float]) -> None:
        self._now, self._wall = now, wall
        self._start_s = self._next_s = now()
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    @property
    def is_due(self) -> bool:
        """Whether the interval has passed."""
        return self._now() >= self._next_s

    def write(self, values: Mapping[str, Any], *, event: str | None = None) -> None:
        """Append a line. A disk that is full loses the line, not the job."""
        now_s = self._now()
        self._next_s = now_s + INTERVAL_S
        line = {"t_s": round(now_s - self._start_s, 4), "time": self._wall(), **values}
        if event is not None:
            line["event"] = event
        with contextlib.suppress(OSError):
            write_all(self._fd, msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
