"""JobStatus: how a job stands at this moment, in a few numbers."""

from __future__ import annotations

import msgspec

from batchwright.job.metrics import Sample
from batchwright.report.read import JobRecord, JobState, Run

RATE_WINDOW_S = 10.0


class JobStatus(msgspec.Struct, kw_only=True):
    """See the module docstring; docs/metrics.md defines the counts.

    Attributes:
        state: starting, running, finished, stopped or broken off.
        process: who works on it, as in "pid 4711"; None: nobody.
        runs: runs so far.
        since: when the present run began, or the last one ended; seconds since 1970.
        updated: when the newest number was logged.
        rows: committed rows by state, of all runs.
        rows_total: rows of the input as far as it is known; an estimate until it is read.
        rows_total_is_exact: the input was read to its end.
        rows_running, rows_waiting: in the engine now.
        eta_s: seconds left.
        tokens_per_s, rows_per_s: generated and finished, over the last RATE_WINDOW_S.
        error_codes: committed rows that failed or expired, by code.
    """

    name: str
    state: str
    process: str | None
    runs: int
    since: float | None
    updated: float | None
    rows: dict[str, int]
    rows_total: int | None
    rows_total_is_exact: bool
    rows_running: int
    rows_waiting: int
    eta_s: float | None
    tokens_per_s: float
    rows_per_s: float
    error_codes: dict[str, int]


def job_status(record: JobRecord, now: float) -> JobStatus:
    """How a job stands.

    Args:
        now: seconds since 1970.
    """
    is_running = record.state is JobState.RUNNING
    run = record.runs[-1] if record.runs else Run()
    last = run.last
    tokens_per_s, rows_per_s = recent_rates(run.samples) if is_running else (0.0, 0.0)
    eta_s = None
    if is_running and last.eta_s is not None:
        eta_s = max(last.eta_s - max(now - last.time, 0.0), 0.0)
    return JobStatus(
        name=record.name,
        state=record.state.value,
        process=record.process,
        runs=len(record.runs),
        since=(run.start.time if is_running else last.time or run.start.time) or None,
        updated=last.time or None,
        rows=record.rows,
        rows_total=last.rows_estimated,
        rows_total_is_exact=last.input_ended,
        rows_running=last.rows_running if is_running else 0,
        rows_waiting=last.rows_waiting if is_running else 0,
        eta_s=eta_s,
        tokens_per_s=tokens_per_s,
        rows_per_s=rows_per_s,
        error_codes=dict(record.error_codes.most_common()),
    )


def recent_rates(samples: list[Sample]) -> tuple[float, float]:
    """(tokens generated, rows finished) per second over about the last RATE_WINDOW_S."""
    if not samples:
        return 0.0, 0.0
    last, before = samples[-1], Sample()
    for sample in reversed(samples[:-1]):
        before = sample
        if last.t_s - sample.t_s >= RATE_WINDOW_S:
            break
    else:
        before = Sample()  # the run is not older: since its start
    elapsed_s = last.t_s - before.t_s
    if elapsed_s <= 0:
        return 0.0, 0.0
    tokens = last.generated_tokens - before.generated_tokens
    return tokens / elapsed_s, (_finished(last) - _finished(before)) / elapsed_s


def _finished(sample: Sample) -> int:
    return sample.rows_succeeded + sample.rows_failed + sample.rows_expired
