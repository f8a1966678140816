"""Rows that a Python caller gives as dicts: read as if each were a line of a JSON-lines file.

One reader and one validator stand behind every entry point, so a dict means what its line would.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from batchwright.errors import InputError, RequestError
from batchwright.job.formats.column_map import ColumnMap, parse_columns
from batchwright.job.formats.openai_batch import LineReader, decode_row
from batchwright.job.formats.row_names import with_names
from batchwright.job.formats.source import MAX_LINE_BYTES, too_long
from batchwright.job.rows import InputRow, RowError

_NAME = "the list of rows"


def read_objects(
    rows: Iterable[Mapping[str, Any]],
    *,
    column: Sequence[str] | None = None,
    template: str | None = None,
    endpoint: str | None = None,
) -> Iterator[InputRow | RowError]:
    """The rows, streamed; one that is not JSON is a RowError.

    Args:
        rows: dicts of OpenAI batch lines, of bare rows, or of a table's columns.
        column, template, endpoint: as in `read_input`.
    Raises:
        ConfigError: column, template or endpoint is wrong; at once.
        InputError: there are no rows, or the first lacks a column.
    """
    return with_names(_read(rows, parse_columns(column, template, endpoint)))


def _read(rows: Iterable[Any], given: ColumnMap) -> Iterator[InputRow | RowError]:
    reader = LineReader(_NAME, given)
    line = 0
    for line, row in enumerate(rows, start=1):
        num_bytes = 0
        try:
            raw = _as_json(row)
            num_bytes = len(raw)
            if num_bytes > MAX_LINE_BYTES:
                raise too_long(num_bytes)
            decoded = decode_row(raw)
        except RequestError as error:
            error.line = line
            yield RowError(line, None, error, num_bytes)
        else:
            yield reader.read(decoded, line, num_bytes, num_bytes)
    if line == 0:
        raise InputError(f"{_NAME} is empty (empty_file)")


def _as_json(row: Any) -> bytes:
    try:
        return json.dumps(dict(row) if isinstance(row, Mapping) else row, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(
            f"not valid JSON: {reason}; give text, numbers, lists and dicts of them",
            code="invalid_json_line",
        ) from None
