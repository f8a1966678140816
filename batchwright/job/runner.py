"""run_job: the only place that knows both files and the engine.

Rows flow through a window of at most `horizon` rows: read, checked and tokenised in chunks while
earlier rows run, written as they finish. Memory is bounded by the window, not by the input, and
the first row runs before the last is read.

A row leaves by exactly one of four doors: a line in the output, a line in the error file (a bad
line, a parameter, a prompt, the engine's refusal), or, when the job is stopped, no line at all: it
then counts as cancelled and can be run again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Protocol

from batchwright.errors import RequestError
from batchwright.job.events import Draining, JobEvent, Progressed, RowFailed
from batchwright.job.formats.completion_body import AnswerForm, TokenBytes, response_body
from batchwright.job.formats.jsonl_writer import JsonlWriter, error_line, success_line
from batchwright.job.prepare import Tokenizer, prepare_rows
from batchwright.job.rows import InputRow, RowError
from batchwright.job.stop import StopControl
from batchwright.job.summary import EngineStats, JobSummary
from batchwright.job.validate import ParsedRow, parse_row
from batchwright.request import DEFAULT_MAX_TOKENS, FinishReason, Request, Result

HORIZON = 4096
CHUNK_ROWS = 256  # rows read and tokenised between two steps
DRAIN_S = 60.0  # how long rows that run may go on after the first request to stop


class JobEngine(Protocol):
    """What a job needs of `engine.Engine`."""

    max_model_len: int

    @property
    def stats(self) -> EngineStats: ...
    @property
    def num_unfinished(self) -> int: ...
    def add(self, request: Request) -> None: ...
    def step(self) -> list[Result]: ...
    def cancel(self, request_id: str) -> None: ...
    def waiting_ids(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class _InFlight:
    """What is kept of a row while the engine has it."""

    line: int
    form: AnswerForm
    num_allowed_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What a job is told besides its files and its engine.

    Attributes:
        model_name: written into each body; rows may name it, or one other name throughout.
        created: seconds since 1970, written into each body.
        input_bytes: size of the input, if it is known.
        horizon: most rows in the engine at once.
        drain_s: how long rows that run may go on after the first request to stop.
    """

    model_name: str
    created: int
    input_bytes: int | None = None
    horizon: int = HORIZON
    drain_s: float = DRAIN_S


class Job:
    """One run from input rows to output lines.

    Args:
        rows: the input, in order.
        output, errors: where lines go.
        engine, tokenizer: what answers the rows.
        token_bytes: the bytes of a token, for log-probabilities.
        options: see there.
        stop: tells when to stop.
        on_event: called as things happen; it must be quick and must not raise.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        rows: Iterator[InputRow | RowError],
        output: JsonlWriter,
        errors: JsonlWriter,
        engine: JobEngine,
        tokenizer: Tokenizer,
        token_bytes: TokenBytes,
        options: JobOptions,
        *,
        stop: StopControl,
        on_event: Callable[[JobEvent], None],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._rows = rows
        self._output = output
        self._errors = errors
        self._engine = engine
        self._tokenizer = tokenizer
        self._token_bytes = lru_cache(maxsize=65536)(token_bytes)
        self._options = options
        self._chunk_rows = min(CHUNK_ROWS, options.horizon)
        self._other_model: str | None = None
        self._stop = stop
        self._on_event = on_event
        self._now = now
        self._in_flight: dict[str, _InFlight] = {}
        self.summary = JobSummary(engine=engine.stats, input_bytes=options.input_bytes)

    def run(self) -> JobSummary:
        """Run all rows, or until stopped; returns the final summary."""
        summary, start_s = self.summary, self._now()
        give_up_s = math.inf
        try:
            while self._in_flight or not (summary.input_ended or summary.stopped):
                if self._stop.requested and not summary.stopped:
                    give_up_s = self._now() + self._options.drain_s
                    self._stop_admitting()
                if self._now() >= give_up_s:
                    break
                if not summary.stopped:
                    self._admit()
                if self._in_flight:
                    for result in self._step():
                        self._finish(result)
                summary.run_s = self._now() - start_s
                self._on_event(Progressed(summary))
            summary.num_cancelled += len(self._in_flight)
        except KeyboardInterrupt:  # anywhere, even between reading a row and adding it
            summary.stopped = True
            summary.num_cancelled += summary.num_in_flight
        summary.run_s = self._now() - start_s
        assert summary.num_in_flight == 0, "a row was lost or counted twice"
        return summary

    # In ---------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Read at most one chunk of rows into the engine, if the window has room for it."""
        room = self._options.horizon - len(self._in_flight)
        if self.summary.input_ended or room < self._chunk_rows:
            return
        rows = list(islice(self._rows, self._chunk_rows))
        self.summary.input_ended = len(rows) < self._chunk_rows
        self.summary.num_rows_read += len(rows)
        self.summary.num_bytes_read += sum(row.num_bytes for row in rows)
        checked = [self._check(row) for row in rows]
        sound = [row for row in checked if isinstance(row, ParsedRow)]
        prepared = iter(prepare_rows(sound, self._tokenizer))
        for row in checked:
            if isinstance(row, RowError):
                self._fail(row.line, row.custom_id, row.error)
            else:
                self._add(row, next(prepared))

    def _check(self, row: InputRow | RowError) -> ParsedRow | RowError:
        if isinstance(row, RowError):
            return row
        try:
            parsed = parse_row(row)
            self._check_model(parsed)
        except RequestError as error:
            return RowError(row.line, row.custom_id, error)
        return parsed

    def _add(self, row: ParsedRow, request: Request | RequestError) -> None:
        """Give a row to the engine; what cannot be run fails here."""
        try:
            if isinstance(request, RequestError):
                raise request
            self._engine.add(request)
        except RequestError as error:
            self._fail(row.line, row.custom_id, error)
            return
        form = AnswerForm(row.is_chat, row.echo, row.report_prompt_logprobs)
        room = self._engine.max_model_len - len(request.prompt_token_ids)
        num_allowed = row.params.n * min(row.params.max_tokens or DEFAULT_MAX_TOKENS, room)
        self._in_flight[row.custom_id] = _InFlight(row.line, form, num_allowed)
        self.summary.num_allowed_tokens += num_allowed

    def _check_model(self, row: ParsedRow) -> None:
        """Files made for another service name its model; one such name is taken to mean ours."""
        if row.model is None or row.model == self._options.model_name:
            return
        if self._other_model is None:
            self._other_model = row.model
        if row.model != self._other_model:
            raise RequestError(
                f"model is {row.model!r:.100}, but earlier rows name {self._other_model!r:.100}; "
                "a job runs one model",
                code="model_mismatch",
                param="model",
                line=row.line,
            )

    # Out --------------------------------------------------------------------------------------

    def _step(self) -> list[Result]:
        with self._stop.interruptible():
            return self._engine.step()

    def _finish(self, result: Result) -> None:
        """Write a result's line and count it."""
        custom_id = result.request_id
        row = self._in_flight.pop(custom_id)
        cancelled = any(o.finish_reason is FinishReason.CANCELLED for o in result.outputs)
        if result.error is not None:
            self._fail(row.line, custom_id, result.error)
        elif cancelled and self.summary.stopped:
            self.summary.num_cancelled += 1  # no line: the row can be run again
        elif cancelled:
            error = RequestError("the row was cancelled before it was done", code="cancelled")
            self._fail(row.line, custom_id, error)
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
        self._output.write(success_line(result.request_id, body))
        summary = self.summary
        summary.num_succeeded += 1
        summary.num_prompt_tokens += len(result.prompt_token_ids)
        summary.num_output_tokens += sum(len(output.token_ids) for output in result.outputs)
        summary.num_allowed_tokens_done += row.num_allowed_tokens
        summary.num_length_limited += any(
            output.finish_reason is FinishReason.LENGTH for output in result.outputs
        )

    def _fail(self, line: int, custom_id: str | None, error: RequestError) -> None:
        self._errors.write(error_line(custom_id, line, error))
        self.summary.num_failed += 1
        self.summary.error_codes[error.code] += 1
        self._on_event(RowFailed(line, custom_id, error))

    def _stop_admitting(self) -> None:
        """Let go of rows that have not started; those that run may finish."""
        self.summary.stopped = True
        waiting = self._engine.waiting_ids()
        for request_id in waiting:
            self._engine.cancel(request_id)
        num_running = len(self._in_flight) - len(waiting)
        self._on_event(Draining(num_running, self._options.drain_s))


def run_job(
    rows: Iterator[InputRow | RowError],
    output_path: str | Path,
    error_path: str | Path,
    engine: JobEngine,
    tokenizer: Tokenizer,
    token_bytes: TokenBytes,
    options: JobOptions,
    *,
    stop: StopControl | None = None,
    on_event: Callable[[JobEvent], None] = lambda event: None,
) -> JobSummary:
    """Run rows to an output file and an error file, replacing both.

    The error file is created at the first failure. Both paths may be the same.

    Returns:
        The summary: rows read == succeeded + failed + cancelled.

    Raises:
        InputError, OutputError: a file fails. Lines written before stay.
    """
    output = JsonlWriter(output_path)
    errors = output if str(error_path) == str(output_path) else JsonlWriter(error_path)
    try:
        output.open()
        if errors is not output:
            errors.remove()
        job = Job(
            rows,
            output,
            errors,
            engine,
            tokenizer,
            token_bytes,
            options,
            stop=stop or StopControl(),
            on_event=on_event,
        )
        return job.run()
    finally:
        output.close()
        errors.close()
