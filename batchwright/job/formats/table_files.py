"""Writing tables: CSV and Parquet, row by row into an open file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from itertools import islice
from typing import IO, Any

import msgspec

from batchwright.job.formats.result_table import EMBEDDING, LOGPROB, RESPONSE, TableShape

ROWS_PER_GROUP = 4096

_encode = msgspec.json.Encoder().encode


def write_csv(
    stream: IO[bytes], rows: Iterable[dict[str, Any]], shape: TableShape, *, delimiter: str
) -> None:
    """Write a header and rows: null is an empty cell, lists and booleans are spelled as in JSON.

    Lines end with CRLF as RFC 4180 says; then the csv module also quotes a lone carriage return.
    """
    text = io.TextIOWrapper(stream, "utf-8", newline="", write_through=False)
    names = shape.names
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_csv_cell(row.get(name)) for name in names])
    text.flush()
    text.detach()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, list | bool):
        return _encode(value).decode()
    return value


def write_parquet(stream: IO[bytes], rows: Iterable[dict[str, Any]], shape: TableShape) -> None:
    """Write row groups of ROWS_PER_GROUP, compressed with Zstandard."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema = _schema(shape)
    remaining = iter(rows)
    with parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        while group := list(islice(remaining, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _schema(shape: TableShape) -> Any:
    import pyarrow as pa

    types = {
        "texts": pa.list_(pa.string()),
        "error_line": pa.int64(),
        "prompt_tokens": pa.int64(),
        "completion_tokens": pa.int64(),
        EMBEDDING: pa.list_(pa.float32()),
        LOGPROB: pa.float64(),
        RESPONSE: pa.large_string(),
    }
    kinds = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
    for name, shown in shape.input_names().items():
        types[shown] = kinds.get(shape.kinds[name] or "", pa.string())
    return pa.schema([(name, types.get(name, pa.string())) for name in shape.names])
