"""The feed: rows are read, checked and tokenised in one background thread, ahead of the engine.

Encoding a batch of texts releases the interpreter, so it overlaps the model. The thread is ahead by
a bounded number of chunks; the first row is handed out before the last is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from batchwright.errors import RequestError
from batchwright.job.journal import ANY_CONTENT, FinishedRows, named_row, unnamed_row
from batchwright.job.prepare import Grammars, Tokenizer, prepare_rows
from batchwright.job.rows import InputRow, RowError, groups
from batchwright.job.validate import ParsedRow, parse_row
from batchwright.prompt_cache.compose import PromptSchemas
from batchwright.request import Request

CHUNK_ROWS = 256
MAX_CHUNKS_AHEAD = 4
POLL_S = 0.2

_NO_CONTENT = b"\0"  # the digest of a row that has a name and cannot be routed

_encode = msgspec.json.Encoder().encode


class RowId(NamedTuple):
    """Which row it is, and what its line needs besides the answer.

    Attributes:
        key: its id in the journal.
        digest: identifies what it asks.
        line: 1-based line of the input.
        custom_id: its name, if it could be read.
        columns: what passes through to the output.
    """

    key: str
    digest: bytes
    line: int
    custom_id: str | None
    columns: dict[str, Any] | None


class ReadyRow(NamedTuple):
    """A row the engine can run."""

    id: RowId
    row: ParsedRow
    request: Request


class RefusedRow(NamedTuple):
    """A row that cannot run; it fails alone."""

    id: RowId
    error: RequestError


class EndedRow(NamedTuple):
    """A row that an earlier run has answered, and how many output tokens it had."""

    request: Request
    num_output: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of the input, in its order.

    Attributes:
        rows: those that have to be answered.
        num_read: rows read, including those that were answered before.
        num_bytes: bytes of the input they took.
        ended: rows that were answered before and whose lengths are known.
    """

    rows: list[ReadyRow | RefusedRow]
    num_read: int
    num_bytes: int
    ended: list[EndedRow] = field(default_factory=list)


class Feed:
    """Chunks of rows from a background thread, which starts at once.

    Args:
        rows: the input.
        tokenizer: makes Requests of rows.
        grammars: compiles the rows' grammars and renders their own templates, ahead of the engine.
        schemas: those that rows may name in prompt_cache.
        check: a further check of each sound row, in input order; raises RequestError.
        finished: rows that are done are counted and skipped; closed by the feed.
        lengths: output tokens of some of these, by their id in the journal.
        chunk_rows: most rows of a chunk.
    """

    def __init__(
        self,
        rows: Iterator[InputRow | RowError],
        tokenizer: Tokenizer,
        *,
        grammars: Grammars | None = None,
        schemas: PromptSchemas | None = None,
        check: Callable[[ParsedRow], None] = lambda row: None,
        finished: FinishedRows | None = None,
        lengths: Mapping[str, int] = MappingProxyType({}),
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._schemas = schemas
        self._check = check
        self._finished = finished
        self._lengths = lengths
        self.chunk_rows = chunk_rows
        self._chunks: queue.Queue[Chunk | Exception | None] = queue.Queue(MAX_CHUNKS_AHEAD)
        self._closed = threading.Event()
        self.ended = False
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def get(self, *, wait: bool) -> Chunk | None:
        """The next chunk; None if the input has ended or none is ready.

        Args:
            wait: wait for one, at most POLL_S, so that the caller can look at other things.

        Raises:
            InputError: the input cannot be read on.
        """
        if self.ended:
            return None
        try:
            item = self._chunks.get(block=wait, timeout=POLL_S)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            self.ended = True
            raise item
        self.ended = item is None
        return item

    def close(self) -> None:
        """Stop reading. At the end of the input everything is closed when this returns; a thread
        that still waits for its input ends with the process."""
        self._closed.set()
        if self.ended:  # it has nothing left to do but to close the journal
            self._thread.join()

    # In the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            for rows in groups(self._rows, self.chunk_rows):
                if not self._put(self._prepare(rows)):
                    return
            self._put(None)
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits must hear of it
            self._put(error)
        finally:
            if self._finished is not None:
                self._finished.close()

    def _put(self, item: Chunk | Exception | None) -> bool:
        while not self._closed.is_set():
            try:
                self._chunks.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _prepare(self, rows: list[InputRow | RowError]) -> Chunk:
        unfinished, finished = self._divided(rows)
        checked = [self._parse(id, row) for id, row in unfinished]
        sound = [item[1] for item in checked if not isinstance(item, RefusedRow)]
        prepared = iter(prepare_rows(sound, self._tokenizer, self._grammars, self._schemas))
        out: list[ReadyRow | RefusedRow] = []
        for item in checked:
            if isinstance(item, RefusedRow):
                out.append(item)
                continue
            id, parsed = item
            request = next(prepared)
            if isinstance(request, RequestError):
                out.append(RefusedRow(id, request))
            else:
                out.append(ReadyRow(id, parsed, request))
        num_bytes = sum(row.num_bytes for row in rows)
        return Chunk(out, len(rows), num_bytes, self._ended(finished))

    def _ended(self, finished: list[tuple[RowId, InputRow | RowError]]) -> list[EndedRow]:
        """Those of the finished rows whose lengths are known."""
        parsed, output = [], []
        for id, row in finished:
            if isinstance(row, RowError) or id.key not in self._lengths:
                continue
            with contextlib.suppress(RequestError):
                parsed.append(parse_row(row))
                output.append(self._lengths[id.key])
        prepared = prepare_rows(parsed, self._tokenizer, self._grammars)
        return [
            EndedRow(request, num_output)
            for request, num_output in zip(prepared, output, strict=True)
            if not isinstance(request, RequestError) and not request.parts
        ]

    def _divided(
        self, rows: list[InputRow | RowError]
    ) -> tuple[list[tuple[RowId, InputRow | RowError]], list[tuple[RowId, InputRow | RowError]]]:
        """Rows that have no answer yet, or whose content has changed since; and the others."""
        ids = [_row_id(row) for row in rows]
        done: dict[str, bytes] = {}
        if self._finished is not None:
            done = self._finished.among([id.key for id in ids])
        unfinished: list[tuple[RowId, InputRow | RowError]] = []
        finished: list[tuple[RowId, InputRow | RowError]] = []
        for id, row in zip(ids, rows, strict=True):
            is_done = done.get(id.key) in (id.digest, ANY_CONTENT)
            (finished if is_done else unfinished).append((id, row))
        return unfinished, finished

    def _parse(self, id: RowId, row: InputRow | RowError) -> tuple[RowId, ParsedRow] | RefusedRow:
        if isinstance(row, RowError):
            return RefusedRow(id, row.error)
        try:
            parsed = parse_row(row)
            self._check(parsed)
        except RequestError as error:
            return RefusedRow(id, error)
        return id, parsed


def _row_id(row: InputRow | RowError) -> RowId:
    if isinstance(row, InputRow):
        content = _encode((row.endpoint, row.body, row.extra))
        digest = hashlib.blake2b(content, digest_size=8).digest()
        return RowId(named_row(row.custom_id), digest, row.line, row.custom_id, row.extra)
    if row.custom_id is None or row.error.code == "duplicate_custom_id":  # it has no name, or
        return RowId(unnamed_row(row.line), ANY_CONTENT, row.line, row.custom_id, row.extra)
    # another row's. Otherwise the error replaces what an earlier run answered by that name.
    return RowId(named_row(row.custom_id), _NO_CONTENT, row.line, row.custom_id, row.extra)
