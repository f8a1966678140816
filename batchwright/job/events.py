"""What a running job tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass

from batchwright.errors import RequestError
from batchwright.job.metrics import Sample
from batchwright.job.summary import JobSummary


@dataclass(frozen=True, slots=True)
class RowFailed:
    """A row went to the error file."""

    line: int
    custom_id: str | None
    error: RequestError


@dataclass(frozen=True, slots=True)
class Progressed:
    """A step was done. The summary is the live one and goes on changing."""

    summary: JobSummary


@dataclass(frozen=True, slots=True)
class Draining:
    """The job was asked to stop; `num_running` rows are finished first, in at most `limit_s`."""

    num_running: int
    limit_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A line was written to metrics.jsonl. Nobody changes the sample any more."""

    sample: Sample


JobEvent = RowFailed | Progressed | Draining | Measured
