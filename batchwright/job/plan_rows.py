"""Rows of a job read for planning: once, through the same feed as for running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from batchwright.errors import RequestError
from batchwright.job.feed import EndedRow, Feed, ReadyRow, RefusedRow
from batchwright.job.journal import FinishedRows
from batchwright.job.prepare import Grammars, Tokenizer
from batchwright.job.rows import InputRow, RowError
from batchwright.job.validate import ParsedRow
from batchwright.limits import ModelLimits
from batchwright.plan.job_rows import JobRows
from batchwright.prompt_cache.compose import PromptSchemas
from batchwright.request import Request


@dataclass(slots=True)
class RowCounts:
    """What was read.

    Attributes:
        num_read: rows of the input.
        num_done: those that an earlier run has finished.
        bad: rows that will fail, by error code.
        longest_line, longest_tokens: line of the row whose prompt and output may be longest, and
            how many tokens that is.
        ended: rows that an earlier run has finished and whose lengths are known.
    """

    num_read: int = 0
    num_done: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    longest_line: int = 0
    longest_tokens: int = 0
    ended: list[EndedRow] = field(default_factory=list)

    @property
    def num_bad(self) -> int:
        """Rows that will fail."""
        return self.bad.total()


def read_rows(
    rows: Iterator[InputRow | RowError],
    into: JobRows,
    tokenizer: Tokenizer,
    limits: ModelLimits,
    *,
    grammars: Grammars | None = None,
    schemas: PromptSchemas | None = None,
    check: Callable[[ParsedRow], None] = lambda row: None,
    finished: FinishedRows | None = None,
    lengths: Mapping[str, int] = MappingProxyType({}),
    fits: Callable[[int], bool] = lambda num_tokens: True,
) -> RowCounts:
    """Read, check and tokenise all rows.

    Args:
        into: is given those that can run.
        schemas: those that rows may name in prompt_cache.
        check: a further check of each row, in input order; raises RequestError.
        lengths: output tokens of rows that an earlier run has finished.
        fits: whether memory can ever hold a sequence of so many tokens.
    Raises:
        InputError: the input cannot be read to its end.
        ResourceError: there is no room for the tokens.
    """
    counts, place = RowCounts(), 0
    feed = Feed(
        rows,
        tokenizer,
        grammars=grammars,
        schemas=schemas,
        check=check,
        finished=finished,
        lengths=lengths,
    )
    try:
        while not feed.ended:
            chunk = feed.get(wait=True)
            if chunk is None:
                continue
            counts.num_read += chunk.num_read
            counts.num_done += chunk.num_read - len(chunk.rows)
            counts.ended += chunk.ended
            for row in chunk.rows:
                try:
                    requests = _checked(row, counts, limits, fits)
                except RequestError as error:
                    counts.bad[error.code] += 1
                else:
                    for request, max_len in requests:
                        into.add(request, max_len, place)
                place += 1
    finally:
        feed.close()
    return counts


def _checked(
    row: ReadyRow | RefusedRow,
    counts: RowCounts,
    limits: ModelLimits,
    fits: Callable[[int], bool],
) -> list[tuple[Request, int]]:
    """(request, tokens at which its sequences end) for each input, or why the row will fail."""
    if isinstance(row, RefusedRow):
        raise row.error
    requests = row.request.parts or (row.request,)
    lengths = [limits.check(request) for request in requests]
    if max(lengths) > counts.longest_tokens:
        counts.longest_line, counts.longest_tokens = row.id.line, max(lengths)
    if not fits(max(lengths)):
        raise RequestError(
            f"prompt and output may reach {max(lengths)} tokens, which memory never holds",
            code="kv_capacity_exceeded",
        )
    return list(zip(requests, lengths, strict=True))
