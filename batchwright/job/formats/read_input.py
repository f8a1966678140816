"""read_input: the rows of any input, by the suffix of its path.

| path | read as |
| --- | --- |
| `.csv`, `.tsv` | tables with a header |
| `.parquet` | streamed by row group |
| a directory | a Hugging Face dataset on disk |
| anything else, and `-` | JSON lines: OpenAI batch lines or bare rows |

Text may be compressed (`.gz`, `.zst`); object stores (`s3://...`) are read through fsspec.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence

from batchwright.errors import InputError
from batchwright.job.formats import arrow_rows
from batchwright.job.formats.arranged_lines import Arrangement, arranged_lines
from batchwright.job.formats.column_map import ColumnMap, parse_columns
from batchwright.job.formats.csv_rows import read_csv
from batchwright.job.formats.openai_batch import read_json_lines
from batchwright.job.formats.row_names import with_names
from batchwright.job.formats.source import (
    COMPRESSED,
    STDIN,
    Source,
    is_url,
    open_source,
    text_suffix,
)
from batchwright.job.rows import InputRow, RowError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_input(
    path: str,
    *,
    column: Sequence[str] | None = None,
    template: str | None = None,
    endpoint: str | None = None,
    arrangement: Arrangement | None = None,
) -> Iterator[InputRow | RowError]:
    """The rows of an input, streamed; a bad one is a RowError.

    Args:
        path: a file, a directory, a URL, or `-` for JSON lines from standard input.
        column: which column gives which parameter: "prompt=text", "custom_id=key".
        template: text with columns in it, which is the prompt.
        endpoint: where rows go that name none; None if it follows from their parameters.
        arrangement: how the rows are ordered, if lines can be read in any order: those of a file
            that is not compressed; None: as they stand in the input.
    Raises:
        ConfigError: column, template or endpoint is wrong; at once.
        InputError: the input is missing, unreadable, has no rows or lacks a column; when the first
            row is asked for, or later if it is damaged further on.
    """
    return _read(path, parse_columns(column, template, endpoint), arrangement)


def input_size(path: str) -> int | None:
    """What `num_bytes` of all rows adds up to, about; None if that cannot be known.

    Raises:
        InputError: a Parquet file cannot be read.
    """
    if path == STDIN or is_url(path) or not os.path.isfile(path):
        return None
    if text_suffix(path) == ".parquet":
        return arrow_rows.num_parquet_rows(path)
    return os.path.getsize(path)


def _read(
    path: str, given: ColumnMap, arrangement: Arrangement | None
) -> Iterator[InputRow | RowError]:
    if path != STDIN and not is_url(path) and os.path.isdir(path):
        yield from with_names(arrow_rows.read_dataset(path, given), "row")
    elif text_suffix(path) == ".parquet":
        if not path.lower().endswith(".parquet"):
            raise InputError(f"{path}: Parquet is compressed inside; decompress the file first")
        yield from with_names(arrow_rows.read_parquet(path, given), "row")
    else:
        delimiter = None if path == STDIN else _DELIMITERS.get(text_suffix(path))
        with open_source(path) as source:
            if delimiter is None:
                _refuse_array(source, path)
                lines = None
                if arrangement is not None and _is_plain_file(path):
                    lines = arranged_lines(path, given, arrangement)
                yield from with_names(read_json_lines(source, given, lines))
            else:
                yield from with_names(read_csv(source, given, delimiter=delimiter))


def _is_plain_file(path: str) -> bool:
    """Whether any of a file's bytes can be read at any time."""
    return not is_url(path) and os.path.isfile(path) and not path.lower().endswith(COMPRESSED)


def _refuse_array(source: Source, path: str) -> None:
    """A .json file may be one array, which would give an error for each of its lines."""
    stream = source.stream
    if text_suffix(path) != ".json" or not isinstance(stream, io.BufferedReader):
        return
    if stream.peek(1)[:64].lstrip().startswith(b"["):
        raise InputError(
            f"{path} is a JSON array; write one object a line: jq -c '.[]' {path} > in.jsonl"
        )
