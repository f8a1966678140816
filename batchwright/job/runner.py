"""Job: the only place that knows both files and the engine.

Rows flow through a window: read, checked and tokenised by the feed while earlier rows run, noted in
the journal as they end, and from there to the output files. Memory is bounded by the window, not by
the input, and the first row runs before the last is read.

A row leaves by exactly one door: succeeded, failed, expired (its time or the job's was up), or,
when the job is stopped, cancelled: it then has no line and is run when the job goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import msgspec

from batchwright.errors import InputError, RequestError, ResourceError
from batchwright.job.answer import AnswerForm, TokenBytes, answer_form
from batchwright.job.engine_counts import EngineCounts, EngineStats
from batchwright.job.events import Draining, JobEvent, Measured, Progressed, RowFailed
from batchwright.job.feed import Chunk, Feed, ReadyRow, RefusedRow, RowId
from batchwright.job.formats.response_body import response_body
from batchwright.job.formats.result_line import error_line, success_line
from batchwright.job.journal import Journal, RowState
from batchwright.job.measure import measure
from batchwright.job.metrics import MetricsLog, Sample
from batchwright.job.output_files import OutputFiles
from batchwright.job.step_times import StepTimes
from batchwright.job.stop import StopControl, StoppedAtOnce
from batchwright.job.summary import EXPIRED_CODES, JobSummary, since_now
from batchwright.plan.shape import ModelShape
from batchwright.request import DEFAULT_MAX_TOKENS, FinishReason, Request, Result, Task

HORIZON_ROWS = 4096
HORIZON_TOKENS = 32_000_000  # 128 MB of prompt tokens, whatever the number of rows
DRAIN_S = 60.0  # how long rows that run may go on after the first request to stop
TIMEOUT_CHECK_S = 1.0

_encode = msgspec.json.Encoder().encode


class JobEngine(Protocol):
    """What a job needs of `engine.Engine`."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def num_unfinished(self) -> int: ...
    @property
    def load(self) -> EngineLoad: ...
    def add(self, request: Request) -> None: ...
    def note_earlier(self, request: Request, num_output: int) -> None: ...
    def step(self) -> list[Result]: ...
    def cancel(self, request_id: str) -> None: ...
    def waiting_ids(self) -> list[str]: ...
    def abandon(self) -> None: ...


class EngineLoad(Protocol):
    """How busy an engine is at the moment."""

    @property
    def num_running_seqs(self) -> int: ...
    @property
    def num_waiting_seqs(self) -> int: ...
    @property
    def kv_used_fraction(self) -> float: ...
    @property
    def helper_bytes(self) -> int:
        """The most memory that processes beside this one have had for themselves."""


@dataclass(slots=True)
class _InFlight:
    """What is kept of a row while the engine has it."""

    id: RowId
    form: AnswerForm
    num_allowed_tokens: int
    num_prompt_tokens: int
    started_s: float | None = None
    expired: RequestError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What a job is told besides its files and its engine.

    Attributes:
        model_name: written into each body.
        created: seconds since 1970, written into each body.
        input_bytes: size of the input, if it is known.
        horizon_rows: most rows in the engine at once.
        drain_s: how long rows that run may go on after the first request to stop.
        deadline_s: rows that have not ended so long after the start of the run expire.
        row_timeout_s: a row expires when it has run for so long.
        keep_failed: rows that failed or expired in an earlier run are not run again.
        load_s: seconds that loading the model took.
    """

    model_name: str
    created: int
    input_bytes: int | None = None
    horizon_rows: int = HORIZON_ROWS
    drain_s: float = DRAIN_S
    deadline_s: float = math.inf
    row_timeout_s: float = math.inf
    keep_failed: bool = False
    load_s: float = 0.0


class Job:
    """One run from a feed of rows to a journal and its files.

    Args:
        feed: the rows.
        journal: where their ends are noted.
        files: what shows them to the user; begun.
        engine: answers the rows.
        token_bytes: the bytes of a token, for log-probabilities.
        options: see there.
        stop: tells when to stop.
        metrics: where progress is logged.
        shape: the model's sizes, which tell prefill from decode.
        compile_s: seconds spent compiling kernels so far.
        on_event: called as things happen; it must be quick and must not raise.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        feed: Feed,
        journal: Journal,
        files: OutputFiles,
        engine: JobEngine,
        token_bytes: TokenBytes,
        options: JobOptions,
        *,
        stop: StopControl,
        metrics: MetricsLog,
        shape: ModelShape | None = None,
        compile_s: Callable[[], float] = lambda: 0.0,
        on_event: Callable[[JobEvent], None] = lambda event: None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._feed = feed
        self._journal = journal
        self._files = files
        self._engine = engine
        self._token_bytes = lru_cache(maxsize=65536)(token_bytes)
        self._options = options
        self._stop = stop
        self._metrics = metrics
        self._on_event = on_event
        self._now = now
        self._in_flight: dict[str, _InFlight] = {}
        self._num_tokens_in_flight = 0
        self._time_is_up = False
        self._next_timeout_check_s = -math.inf
        self.summary = JobSummary(engine=since_now(engine.stats), input_bytes=options.input_bytes)
        self._counts_at_start = self._counts = EngineCounts.of(engine.stats)
        self._times = StepTimes(shape)
        self._compile_s = compile_s

    def run(self) -> JobSummary:
        """Run all rows, or until stopped; returns the final summary.

        Raises:
            InputError, OutputError, ResourceError: a file fails, or there is no memory to go on.
                Rows that have ended are committed first, unless it is their file that fails.
        """
        summary, start_s = self.summary, self._now()
        try:
            self._loop(start_s)
            summary.num_cancelled += len(self._in_flight)
        except StoppedAtOnce:  # anywhere, even between reading a row and adding it
            summary.stopped = True
            summary.num_cancelled += summary.num_in_flight
        except (InputError, ResourceError):
            self._commit()
            raise
        self._commit()
        summary.run_s = self._now() - start_s
        assert summary.num_in_flight == 0, "a row was lost or counted twice"
        return summary

    def _loop(self, start_s: float) -> None:
        summary, options = self.summary, self._options
        give_up_s = math.inf
        while self._in_flight or not (self._feed.ended or summary.stopped):
            now_s = self._now()
            if self._stop.requested and not summary.stopped:
                give_up_s = now_s + options.drain_s
                self._stop_admitting()
            if now_s >= give_up_s:
                return
            if now_s - start_s >= options.deadline_s and not self._time_is_up:
                self._expire_all()
            self._expire_slow_rows(now_s)
            if not summary.stopped:
                self._admit()
            if self._metrics.is_due:
                self.log_metrics()
            if self._engine.num_unfinished:  # others may use the engine besides this job
                self._step()
            summary.run_s = self._now() - start_s
            summary.input_ended = self._feed.ended
            if self._journal.is_due:
                self._commit()
            self._on_event(Progressed(summary))

    # In ---------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Take at most one chunk of rows into the engine, if the window has room for it."""
        room = self._options.horizon_rows - len(self._in_flight)
        if room < self._feed.chunk_rows or self._num_tokens_in_flight >= HORIZON_TOKENS:
            return
        start_s = self._now()
        with self._stop.interruptible():
            chunk = self._feed.get(wait=not self._engine.num_unfinished)
        self.summary.idle_s += self._now() - start_s
        if chunk is not None:
            self._take_in(chunk)

    def _take_in(self, chunk: Chunk) -> None:
        self.summary.num_rows_read += chunk.num_read
        self.summary.num_bytes_read += chunk.num_bytes
        self.summary.num_skipped += chunk.num_read - len(chunk.rows)
        for ended in chunk.ended:
            self._engine.note_earlier(ended.request, ended.num_output)
        for row in chunk.rows:
            if isinstance(row, RefusedRow):
                self._fail(row.id, row.error)
            elif self._time_is_up:
                self._fail(row.id, _deadline_error())
            else:
                self._add(row)

    def _add(self, ready: ReadyRow) -> None:
        """Give a row to the engine; what cannot be run fails here."""
        id, row, request = ready
        try:
            self._engine.add(request)
        except RequestError as error:
            self._fail(id, error)
            return
        num_prompt = request.num_prompt_tokens
        num_allowed = _num_allowed_tokens(request, self._engine.max_model_len)
        form = answer_form(row, request)
        self._in_flight[request.id] = _InFlight(id, form, num_allowed, num_prompt)
        self._num_tokens_in_flight += num_prompt
        self.summary.num_allowed_tokens += num_allowed

    # Out --------------------------------------------------------------------------------------

    def _step(self) -> None:
        compiled_s, start_s = self._compile_s(), self._now()
        with self._stop.interruptible():
            results = self._engine.step()
        end_s = self._now()
        before, self._counts = self._counts, EngineCounts.of(self._engine.stats)
        self._times.add(
            self._counts.since(before),
            start_s,
            end_s,
            compile_s=self._compile_s() - compiled_s,
            is_last_work=self._nothing_waits(),
        )
        for result in results:
            self._finish(result)
        self.summary.write_s += self._now() - end_s

    def _nothing_waits(self) -> bool:
        all_read = self._feed.ended or self.summary.stopped
        return all_read and not self._engine.load.num_waiting_seqs

    def _finish(self, result: Result) -> None:
        """Note a result in the journal and count it."""
        row = self._in_flight.pop(result.request_id)
        self._num_tokens_in_flight -= row.num_prompt_tokens
        cancelled = any(o.finish_reason is FinishReason.CANCELLED for o in result.outputs) or (
            result.error is not None and result.error.code == "cancelled"
        )
        if cancelled and row.expired is None and self.summary.stopped:
            self.summary.num_cancelled += 1  # no line: the row is run when the job goes on
        elif cancelled:
            error = row.expired or RequestError("the row was cancelled", code="cancelled")
            self._fail(row.id, error)
        elif result.error is not None:
            self._fail(row.id, result.error)
        else:
            self._succeed(result, row)
            return
        self.summary.num_allowed_tokens -= row.num_allowed_tokens

    def _succeed(self, result: Result, row: _InFlight) -> None:
        body = response_body(
            result,
            row.form,
            self._token_bytes,
            model=self._options.model_name,
            created=self._options.created,
        )
        data = _encode(success_line(result.request_id, body, row.id.columns)) + b"\n"
        self._journal.append(row.id.key, row.id.line, RowState.SUCCEEDED, row.id.digest, data)
        summary = self.summary
        summary.num_succeeded += 1
        summary.num_prompt_tokens += len(result.prompt_token_ids)
        summary.prompt_lengths[len(result.prompt_token_ids).bit_length()] += 1
        for output in result.outputs:
            summary.num_output_tokens += len(output.token_ids)
            summary.output_lengths[len(output.token_ids).bit_length()] += 1
        summary.num_allowed_tokens_done += row.num_allowed_tokens
        summary.num_length_limited += any(
            output.finish_reason is FinishReason.LENGTH for output in result.outputs
        )

    def _fail(self, id: RowId, error: RequestError) -> None:
        expired = error.code in EXPIRED_CODES
        state = RowState.EXPIRED if expired else RowState.FAILED
        data = _encode(error_line(id.custom_id, id.line, error, id.columns)) + b"\n"
        self._journal.append(id.key, id.line, state, id.digest, data)
        self.summary.num_expired += expired
        self.summary.num_failed += not expired
        self.summary.error_codes[error.code] += 1
        self._on_event(RowFailed(id.line, id.custom_id, error))

    def _commit(self) -> None:
        start_s = self._now()
        self._files.write(self._journal.commit())
        self.summary.write_s += self._now() - start_s

    # Ends that are not a row's own ---------------------------------------------------------------

    def _stop_admitting(self) -> None:
        """Let go of rows that have not started; those that run may finish."""
        self.summary.stopped = True
        waiting = self._engine.waiting_ids()
        for request_id in waiting:
            self._engine.cancel(request_id)
        num_running = len(self._in_flight) - len(waiting)
        self._on_event(Draining(num_running, self._options.drain_s))

    def _expire_all(self) -> None:
        """The job's time is up: rows in the engine and rows still to be read expire."""
        self._time_is_up = True
        for request_id, row in self._in_flight.items():
            row.expired = _deadline_error()
            self._engine.cancel(request_id)

    def _expire_slow_rows(self, now_s: float) -> None:
        limit_s = self._options.row_timeout_s
        if limit_s == math.inf or now_s < self._next_timeout_check_s:
            return
        self._next_timeout_check_s = now_s + min(TIMEOUT_CHECK_S, limit_s / 4)
        waiting = set(self._engine.waiting_ids())
        for request_id, row in self._in_flight.items():
            if request_id in waiting or row.expired is not None:
                continue
            if row.started_s is None:
                row.started_s = now_s
            elif now_s - row.started_s >= limit_s:
                row.expired = RequestError(
                    f"the row ran for {now_s - row.started_s:.1f} s, the limit of a row is "
                    f"{limit_s:g} s; raise --row-timeout or lower max_tokens",
                    code="row_timeout",
                )
                self._engine.cancel(request_id)

    def log_metrics(self, *, event: str | None = None) -> Sample:
        """Write a line to metrics.jsonl and tell whoever watches."""
        sample = self._measure()
        if (since_s := self._times.tail_since_s) is not None:
            sample.tail_since_s = self._metrics.clock(since_s)
        self._metrics.write(sample, event=event)
        self._on_event(Measured(sample))
        return sample

    def _measure(self) -> Sample:
        load = self._engine.load
        return measure(
            self.summary,
            EngineCounts.of(self._engine.stats).since(self._counts_at_start),
            self._times,
            rows_waiting=len(self._engine.waiting_ids()),
            num_running_seqs=load.num_running_seqs,
            num_waiting_seqs=load.num_waiting_seqs,
            kv_used_fraction=load.kv_used_fraction,
            helper_bytes=load.helper_bytes,
        )


def _num_allowed_tokens(request: Request, max_model_len: int) -> int:
    """Output tokens that a request may have."""
    if request.parts:
        return sum(_num_allowed_tokens(part, max_model_len) for part in request.parts)
    if request.task is not Task.GENERATE:
        return 0
    params, room = request.params, max_model_len - request.num_prompt_tokens
    return params.n * min(params.max_tokens or DEFAULT_MAX_TOKENS, room)


def _deadline_error() -> RequestError:
    return RequestError(
        "the job's deadline passed before the row was done; run it again with a later deadline",
        code="batch_expired",
    )
