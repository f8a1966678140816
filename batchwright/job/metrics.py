"""metrics.jsonl: how a job went, a line a second, for `status`, `report` and dashboards.

Each run of a job adds a `RunStart` and then `Sample`s; docs/metrics.md defines every field. No line
holds text or ids of rows.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from batchwright.errors import OutputError
from batchwright.job.durable import write_all
from batchwright.job.machine import Machine
from batchwright.plan.shape import ModelShape

INTERVAL_S = 1.0


class RunStart(msgspec.Struct, kw_only=True):
    """The first line of a run: what runs where. Defaults stand for what a line lacks.

    Attributes:
        event: "start".
        time: seconds since 1970.
        engine: version of Batchwright.
        model: as the user named it.
        load_s: seconds that loading the model took.
        pid: the process.
        machine: the processor and memory.
        settings: the engine's settings, open ones settled.
        shape: the model's sizes; None if they are not known.
    """

    event: str = "start"
    time: float = 0.0
    engine: str = ""
    model: str = ""
    load_s: float = 0.0
    pid: int = 0
    machine: Machine = msgspec.field(default_factory=Machine)
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    shape: ModelShape | None = None


class Sample(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The state of a run at one moment. Counts are since the start of the run.

    Defaults stand for what a line of an older version lacks.
    """

    t_s: float = 0.0
    time: float = 0.0
    event: str | None = None  # "end" in a run's last line, "error" if the run broke off
    # rows
    rows_read: int = 0
    rows_skipped: int = 0
    rows_succeeded: int = 0
    rows_failed: int = 0
    rows_expired: int = 0
    rows_cancelled: int = 0
    rows_length_limited: int = 0
    rows_folded: int = 0
    rows_running: int = 0
    rows_waiting: int = 0
    rows_estimated: int | None = None
    input_ended: bool = False
    stopped: bool = False
    eta_s: float | None = None
    error_codes: dict[str, int] = msgspec.field(default_factory=dict)
    # tokens
    prompt_tokens: int = 0
    output_tokens: int = 0
    allowed_tokens_done: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    computed_prompt_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    prompt_lengths: list[int] = msgspec.field(default_factory=list)
    output_lengths: list[int] = msgspec.field(default_factory=list)
    # work
    steps: int = 0
    step_rows: int = 0
    logits: int = 0
    keys: list[int] = msgspec.field(default_factory=list)
    recomputed_keys: list[int] = msgspec.field(default_factory=list)
    # seconds
    step_s: float = 0.0
    compile_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    idle_s: float = 0.0
    write_s: float = 0.0
    tail_since_s: float | None = None
    tail_prefill_s: float = 0.0
    tail_decode_s: float = 0.0
    # of the moment
    num_running_seqs: int = 0
    num_waiting_seqs: int = 0
    kv_used_fraction: float = 0.0
    peak_memory_bytes: int = 0


class MetricsLog:
    """Appends to metrics.jsonl.

    Args:
        path: the file; earlier runs' lines stay.
        now, wall: clocks, in seconds since some moment and since 1970.
    """

    def __init__(self, path: Path, *, now: Callable[[], float], wall: Callable[[], float]) -> None:
        self._now, self._wall = now, wall
        self._start_s = self._next_s = now()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            size = os.fstat(self._fd).st_size
            # A line that a crash has cut off must not take the next one with it.
            self._is_torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    @property
    def is_due(self) -> bool:
        """Whether the interval has passed."""
        return self._now() >= self._next_s

    def clock(self, now_s: float) -> float:
        """A reading of `now` as seconds since the start of the run."""
        return now_s - self._start_s

    def start(self, start: RunStart) -> None:
        """Write the first line of a run."""
        start.time = self._wall()
        self._append(start)

    def write(self, sample: Sample, *, event: str | None = None) -> None:
        """Write a line; sets its times."""
        now_s = self._now()
        self._next_s = now_s + INTERVAL_S
        sample.t_s, sample.time, sample.event = self.clock(now_s), self._wall(), event
        self._append(sample)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _append(self, line: RunStart | Sample) -> None:
        """A disk that is full loses the line, not the job."""
        data = b"\n" * self._is_torn + msgspec.json.encode(line) + b"\n"
        try:
            write_all(self._fd, data)
        except OSError:
            self._is_torn = True
        else:
            self._is_torn = False


def peak_memory_bytes() -> int:
    """The most memory this process has had resident; 0 where the system does not say."""
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak) * (1 if sys.platform == "darwin" else 1024)
    return 0
