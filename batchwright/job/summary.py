"""What has become of a job's rows: counted while it runs, the summary when it ends."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

from batchwright.job.engine_counts import EngineStats

EXPIRED_CODES = frozenset({"batch_expired", "row_timeout"})
"""Errors of rows that expired; a row with any other one failed."""


def since_now(stats: EngineStats) -> EngineStats:
    """The same counts from now on: an engine may have run other rows before the job's."""
    return cast(EngineStats, _SinceNow(stats))


class _SinceNow:
    def __init__(self, stats: EngineStats) -> None:
        self._stats, self._before = stats, copy.deepcopy(stats)

    def __getattr__(self, name: str) -> int:
        return int(getattr(self._stats, name) - getattr(self._before, name))


@dataclass(slots=True, kw_only=True)
class JobSummary:
    """Counts of one run of a job. Every row read was finished before, or ends as succeeded,
    failed, expired or cancelled.

    Attributes:
        num_rows_read: rows taken from the input, bad lines included.
        num_skipped: rows that an earlier run finished.
        num_failed_before: rows that failed or expired in an earlier run and were not run again.
        num_expired: rows whose time, or the job's, was up.
        num_cancelled: rows read but neither answered nor failed, because the job was stopped.
        num_length_limited: rows with an output that ended at max_tokens or the context.
        error_codes: failed and expired rows by error code.
        num_prompt_tokens, num_output_tokens: of rows that succeeded.
        num_allowed_tokens: output tokens that rows given to the engine may have (n * max_tokens).
        num_allowed_tokens_done: the same of those that succeeded.
        input_bytes: size of the input, None if it cannot be known (standard input).
        num_bytes_read: input bytes of the rows read.
        input_ended: the input was read to its end.
        prompt_lengths, output_lengths: the same rows and outputs by length; entry i counts lengths
            of i bits: 0, 1, 2 to 3, 4 to 7, 8 to 15, ...
        idle_s: seconds the engine waited for input.
        write_s: seconds in which answers were made, committed and written to the files.
        run_s: seconds from the first row read to the last row written.
        stopped: the user asked to stop.
        engine: the engine's own counts, from the start of the run.
    """

    engine: EngineStats
    input_bytes: int | None = None
    num_rows_read: int = 0
    num_succeeded: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_failed_before: int = 0
    num_expired: int = 0
    num_cancelled: int = 0
    num_length_limited: int = 0
    error_codes: Counter[str] = field(default_factory=Counter)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_allowed_tokens: int = 0
    num_allowed_tokens_done: int = 0
    num_bytes_read: int = 0
    input_ended: bool = False
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    output_lengths: Counter[int] = field(default_factory=Counter)
    idle_s: float = 0.0
    write_s: float = 0.0
    run_s: float = 0.0
    stopped: bool = False

    @property
    def num_finished(self) -> int:
        """Rows that this run brought to an end."""
        return self.num_succeeded + self.num_failed + self.num_expired

    @property
    def num_done(self) -> int:
        """Rows that have an end, whichever run brought it."""
        return self.num_skipped + self.num_finished

    @property
    def num_in_flight(self) -> int:
        """Rows read that have no end yet."""
        return self.num_rows_read - self.num_skipped - self.num_finished - self.num_cancelled

    @property
    def estimated_rows(self) -> int | None:
        """Rows of the whole input: exact once it is read, before that judged by its bytes."""
        if self.input_ended:
            return self.num_rows_read
        if self.input_bytes is None or not self.num_bytes_read:
            return None
        estimate = round(self.num_rows_read * self.input_bytes / self.num_bytes_read)
        return max(self.num_rows_read, estimate)

    @property
    def eta_s(self) -> float | None:
        """Seconds left, from the output tokens still expected at the rate so far.

        Rows that are not done are expected to use the same share of what they are allowed as those
        that are; rows not read yet, to be like those read. None until a row has succeeded.
        """
        rows, generated = self.estimated_rows, self.engine.num_generated_tokens
        share = used_share(self.num_output_tokens, self.num_allowed_tokens_done)
        if rows is None or not share:
            return None
        in_engine = share * (self.num_allowed_tokens - self.num_allowed_tokens_done)
        num_new = self.num_rows_read - self.num_skipped  # rows finished before come first
        unread = share * self.num_allowed_tokens * (rows - self.num_rows_read) / num_new
        produced = max(generated, self.num_output_tokens)  # some rows share a computation
        done_ahead = produced - self.num_output_tokens
        # Never less than a quarter of what was expected: long rows are the last to finish.
        tokens_left = unread + max(in_engine - done_ahead, in_engine / 4)
        return tokens_left * self.run_s / produced


def used_share(num_output_tokens: int, num_allowed_tokens: int) -> float | None:
    """Share of the output tokens they were allowed that finished rows used; None without any."""
    return num_output_tokens / num_allowed_tokens if num_allowed_tokens else None
