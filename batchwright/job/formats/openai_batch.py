"""Reading OpenAI batch files: one JSON object a line, `{"custom_id", "method", "url", "body"}`.

Bare rows are read too: `{"id"?, "prompt" | "messages" | "prompt_token_ids" | "input" | "context",
...parameters}`. A byte order mark, CRLF and blank lines are tolerated. The file is read as a
stream: memory is bounded by the longest line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec

from batchwright.errors import InputError, RequestError
from batchwright.job.formats.column_map import ColumnMap
from batchwright.job.formats.columns import Columns, for_endpoint
from batchwright.job.formats.lines import Line, numbered_lines
from batchwright.job.formats.row_names import id_text, json_kind
from batchwright.job.formats.source import Source, too_long
from batchwright.job.rows import ENDPOINTS, UNNAMED, InputRow, RowError, endpoint_of_bare_row

_BATCH_KEYS = {"custom_id", "method", "url", "body"}
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_decode_json = msgspec.json.Decoder().decode


def read_json_lines(
    source: Source, given: ColumnMap, lines: Iterator[Line] | None = None
) -> Iterator[InputRow | RowError]:
    """Yield the rows of a batch file; a bad line is yielded as a RowError.

    With a column map, each line is a table's row.

    Args:
        lines: of the source, in the order in which they are wanted; None: as they stand there.
    Raises:
        InputError: not UTF-8 text at all, no rows, or the first row lacks the prompt's column.
    """
    reader = LineReader(source.name, given)
    num_rows = 0
    for line in lines or numbered_lines(source.stream):
        row = reader.row_of(line, source.progress)
        if row is None:
            continue
        num_rows += 1
        if source.would_wait is not None and source.would_wait():
            row = replace(row, pause_follows=True)
        yield row
    if num_rows == 0:
        raise InputError(f"{source.name} has no rows (empty_file); it needs one JSON object a line")


def without_mark(raw: bytes, name: str) -> bytes:
    """The first line of a text file without its byte order mark.

    Raises:
        InputError: the mark is UTF-16's.
    """
    if raw.startswith(_UTF16_MARKS):
        raise InputError(f"{name} is UTF-16 text; save it as UTF-8")
    return raw.removeprefix(_UTF8_MARK)


class LineReader:
    """From decoded lines to rows.

    Args:
        name: what messages call the input.
        given: with a mapping, each line is a table's row.
    """

    def __init__(self, name: str, given: ColumnMap) -> None:
        self._name = name
        self._given = given
        self._columns: Columns | None = None

    def row_of(
        self, line: Line, progress: Callable[[], int] | None = None
    ) -> InputRow | RowError | None:
        """The row of a line of a file; None if the line is blank.

        Args:
            progress: see `Source`.
        """
        raw = line.raw
        if line.number == 1 and raw is not None:
            raw = without_mark(raw, self._name)
        if raw is not None and not raw.strip():
            return None
        num_bytes = line.num_bytes if progress is None else progress()
        try:
            if raw is None:
                raise too_long(line.num_bytes)
            row = decode_row(raw)
        except RequestError as error:
            error.line = line.number
            return RowError(line.number, None, error, num_bytes)
        return self.read(row, line.number, num_bytes, len(raw))

    def read(
        self, row: dict[str, Any], line: int, num_bytes: int, memory_bytes: int
    ) -> InputRow | RowError:
        """The row of one line, which is what `decode_row` made of it."""
        if self._given.is_given:
            if self._columns is None:
                self._columns = Columns(self._given, list(row), self._name, is_sample=True)
            return self._columns.row(line, row, num_bytes)
        custom_id: str | None = None
        try:
            custom_id = _given_id(row)
            endpoint, body = _route(row, self._given.endpoint)
        except RequestError as error:
            error.line = line
            return RowError(line, custom_id, error, num_bytes)
        return InputRow(line, custom_id, endpoint, body, num_bytes, None, memory_bytes)


def decode_row(raw: bytes) -> dict[str, Any]:
    """A line as a dict.

    Raises:
        RequestError: it is not JSON, or not an object.
    """
    try:
        row = _decode_json(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"not valid JSON: {reason}", code="invalid_json_line") from None
    if not isinstance(row, dict):
        raise RequestError(
            f"a row must be a JSON object, not {json_kind(row)}", code="invalid_json_line"
        )
    return row


def _given_id(row: dict[str, Any]) -> str:
    """The name that a row gives. Only a bare row may lack one, or give a whole number."""
    bare = not _is_batch_line(row)
    if bare and "id" in row and "custom_id" in row:
        raise RequestError('give "id" or "custom_id", not both', param="id")
    key = "id" if bare and "id" in row else "custom_id"
    value = row.get(key)
    if value is None:
        if bare:
            return UNNAMED
        raise RequestError(
            "custom_id is missing", code="missing_required_parameter", param="custom_id"
        )
    if not bare and not isinstance(value, str):
        raise RequestError(f"custom_id must be a string, not {json_kind(value)}", param=key)
    return id_text(key, value)


def _is_batch_line(row: dict[str, Any]) -> bool:
    return "body" in row or "method" in row or "url" in row


def _route(row: dict[str, Any], bare_endpoint: str | None) -> tuple[str, dict[str, Any]]:
    """(endpoint, body) of a batch line or a bare row."""
    if not _is_batch_line(row):
        body = {key: value for key, value in row.items() if key not in ("id", "custom_id")}
        endpoint = bare_endpoint or endpoint_of_bare_row(body)
        return endpoint, for_endpoint(body, endpoint)
    if unknown := sorted(row.keys() - _BATCH_KEYS):
        raise RequestError(
            f"unknown key {unknown[0]!r} beside the body; parameters belong inside the body",
            code="unknown_parameter",
            param=unknown[0],
        )
    if (method := row.get("method", "POST")) != "POST":
        raise RequestError(f"method is {method!r:.100}; only POST is known", param="method")
    url, inner = row.get("url"), row.get("body")
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise RequestError(
            f"url is {url!r:.100}; supported: {', '.join(ENDPOINTS)}",
            code="url_mismatch",
            param="url",
        )
    if not isinstance(inner, dict):
        raise RequestError(
            f"body must be a JSON object, not {json_kind(inner)}",
            code="missing_required_parameter" if inner is None else "invalid_request",
            param="body",
        )
    return url, inner
