"""Reading OpenAI batch files: one JSON object a line, `{"custom_id", "method", "url", "body"}`.

Bare rows are read too: `{"id"?, "prompt" | "messages" | "prompt_token_ids", ...parameters}`. A byte
order mark, CRLF and blank lines are tolerated. The file is read as a stream: memory is bounded by
the longest line, and by the set of custom_ids that keeps them unique.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from batchwright.errors import InputError, RequestError
from batchwright.job.rows import CHAT, COMPLETIONS, ENDPOINTS, InputRow, RowError

MAX_LINE_BYTES = 64 * 1024 * 1024
MAX_ID_CHARS = 1000

_BATCH_KEYS = {"custom_id", "method", "url", "body"}
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_decode_json = msgspec.json.Decoder().decode


def read_rows(path: str | Path) -> Iterator[InputRow | RowError]:
    """Yield the rows of a batch file in order; a bad line is yielded as a RowError.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8 text at all, or has no rows.
    """
    try:
        with open(path, "rb") as stream:
            yield from read_stream(stream, str(path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def read_stream(stream: BinaryIO, name: str) -> Iterator[InputRow | RowError]:
    """As `read_rows`, from an open binary stream; `name` is used in messages."""
    seen: set[str] = set()
    num_rows = 0
    for line, (raw, num_bytes) in enumerate(_lines(stream), start=1):
        if line == 1:
            if raw.startswith(_UTF16_MARKS):
                raise InputError(f"{name} is UTF-16 text; save it as UTF-8")
            raw = raw.removeprefix(_UTF8_MARK)
        if not raw.strip():
            continue
        num_rows += 1
        yield _read_line(raw, line, num_bytes, seen)
    if num_rows == 0:
        raise InputError(f"{name} has no rows (empty_file); it needs one JSON object a line")


def _lines(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Lines and their sizes in bytes. Of an overlong line only the first part is kept."""
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        num_bytes = len(raw)
        rest = raw
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES + 1)
            num_bytes += len(rest)
        yield raw, num_bytes


def _read_line(raw: bytes, line: int, num_bytes: int, seen: set[str]) -> InputRow | RowError:
    custom_id: str | None = None
    try:
        row = _decode(raw, num_bytes)
        custom_id = _custom_id(row, line)
        if custom_id in seen:
            raise RequestError(
                f"custom_id {custom_id!r} was used by an earlier row; each row needs its own",
                code="duplicate_custom_id",
                param="custom_id",
            )
        seen.add(custom_id)
        endpoint, body = _route(row)
    except RequestError as error:
        error.line = line
        return RowError(line, custom_id, error, num_bytes)
    return InputRow(line, custom_id, endpoint, body, num_bytes)


def _decode(raw: bytes, num_bytes: int) -> dict[str, Any]:
    if num_bytes > MAX_LINE_BYTES:
        raise RequestError(
            f"line has {num_bytes} bytes; at most {MAX_LINE_BYTES} are read; shorten it",
            code="invalid_json_line",
        )
    try:
        row = _decode_json(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"not valid JSON: {reason}", code="invalid_json_line") from None
    if not isinstance(row, dict):
        raise RequestError(
            f"a row must be a JSON object, not {_json_kind(row)}", code="invalid_json_line"
        )
    return row


def _custom_id(row: dict[str, Any], line: int) -> str:
    """The row's name. Only a bare row may lack one, or give a whole number."""
    bare = not _is_batch_line(row)
    if bare and "id" in row and "custom_id" in row:
        raise RequestError('give "id" or "custom_id", not both', param="id")
    key = "id" if bare and "id" in row else "custom_id"
    value = row.get(key)
    if value is None:
        if bare:
            return f"line-{line}"
        raise RequestError(
            "custom_id is missing", code="missing_required_parameter", param="custom_id"
        )
    if bare and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID_CHARS:
        raise RequestError(
            f"{key} must be a string of 1 to {MAX_ID_CHARS} characters, not {_json_kind(value)}",
            param=key,
        )
    return value


def _is_batch_line(row: dict[str, Any]) -> bool:
    return "body" in row or "method" in row or "url" in row


def _route(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(endpoint, body) of a batch line or a bare row."""
    if not _is_batch_line(row):
        body = {key: value for key, value in row.items() if key not in ("id", "custom_id")}
        return (CHAT if "messages" in body else COMPLETIONS), body
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
            f"body must be a JSON object, not {_json_kind(inner)}",
            code="missing_required_parameter" if inner is None else "invalid_request",
            param="body",
        )
    return url, inner


def _json_kind(value: object) -> str:
    """What a JSON value is, in JSON's words, short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return f"the number {value!s:.40}"
