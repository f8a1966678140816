"""Reading Parquet files and Hugging Face datasets on disk, batch by batch, through pyarrow.

Rows are numbered from 1; those without an id are called `row-N`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from batchwright.errors import BatchwrightError, InputError, RequestError
from batchwright.job.formats.column_map import ColumnMap
from batchwright.job.formats.columns import Columns
from batchwright.job.formats.source import explained, need_package, open_binary
from batchwright.job.rows import InputRow, RowError

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 256
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
READ_BYTES = 1 << 20  # of a column at a time, so that a row group need not fit into memory


def read_parquet(path: str, given: ColumnMap) -> Iterator[InputRow | RowError]:
    """Yield the rows of a Parquet file, each of which counts as one byte of progress.

    Raises:
        InputError: unreadable, no rows, a column is missing, or pyarrow is not installed.
    """
    need_package("pyarrow", "parquet", path)
    import pyarrow.parquet as parquet

    with _explained(path), open_binary(path) as stream:
        file = parquet.ParquetFile(stream, buffer_size=READ_BYTES, pre_buffer=False)
        batches = file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)
        yield from _rows(batches, file.schema_arrow, given, path)


def read_dataset(path: str, given: ColumnMap) -> Iterator[InputRow | RowError]:
    """Yield the rows of a directory that `datasets.Dataset.save_to_disk` wrote.

    Raises:
        InputError: it is not such a directory, or as `read_parquet`.
    """
    need_package("pyarrow", "parquet", path)
    files = _dataset_files(Path(path))
    with _explained(path):
        schema = next(_batches(files[:1], with_schema=True))
        yield from _rows(_batches(files), schema, given, path)


def num_parquet_rows(path: str) -> int:
    """How many rows a Parquet file has, from its footer.

    Raises:
        InputError: as `read_parquet`.
    """
    need_package("pyarrow", "parquet", path)
    import pyarrow.parquet as parquet

    with _explained(path), open_binary(path) as stream:
        return int(parquet.ParquetFile(stream).metadata.num_rows)


def _rows(
    batches: Iterator[pyarrow.RecordBatch], schema: pyarrow.Schema, given: ColumnMap, path: str
) -> Iterator[InputRow | RowError]:
    if len(set(schema.names)) < len(schema.names):
        raise InputError(f"{path} has two columns of the same name; rename one")
    columns = Columns(given, schema.names, path)
    number = 0
    for batch in batches:
        for cells in _cells(batch):
            number += 1
            if isinstance(cells, RequestError):
                cells.line = number
                yield RowError(number, None, cells, 1)
            else:
                yield columns.row(number, cells, 1)
    if number == 0:
        raise InputError(f"{path} has no rows (empty_file)")


def _cells(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | RequestError]:
    """A batch's rows as Python values; if one cannot be, only that one is an error."""
    try:
        yield from _in_microseconds(batch).to_pylist()
        return
    except (ValueError, OverflowError):  # text that is not UTF-8, dates beyond the year 9999
        pass
    for index in range(batch.num_rows):
        try:
            yield _in_microseconds(batch.slice(index, 1)).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield RequestError(f"the row cannot be read: {error}", code="invalid_row")


def _in_microseconds(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Python's times have no nanoseconds; pyarrow would need pandas for them."""
    import pyarrow as pa

    for index, field in enumerate(batch.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            column = batch.column(index).cast(pa.timestamp("us", field.type.tz), safe=False)
        elif field.type == pa.duration("ns"):
            column = batch.column(index).cast(pa.duration("us"), safe=False)
        else:
            continue
        batch = batch.set_column(index, field.name, column)
    return batch


def _dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset, as its state.json lists them."""
    splits = folder / "dataset_dict.json"
    if splits.exists():
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise InputError(f"{folder} holds several splits; name one of them: {found}")
    try:
        state = msgspec.json.decode((folder / "state.json").read_bytes())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except FileNotFoundError:
        raise InputError(
            f"{folder} is a directory without state.json; give a file, or a dataset that "
            "datasets.save_to_disk wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/state.json cannot be read: {error}") from None
    if state.get("_indices_data_files"):
        raise InputError(f"{folder} selects rows by an index; save it again with flatten_indices()")
    files = [folder / Path(name).name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise InputError(f"{folder} lacks {missing[0] if missing else 'data files'}; copy it again")
    return files


def _batches(files: list[Path], *, with_schema: bool = False) -> Iterator[Any]:
    """Record batches of Arrow stream files, at most BATCH_ROWS rows each; or only the schema."""
    import pyarrow as pa

    for file in files:
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
            _check_end(file)
            if with_schema:
                yield stream.schema
                return
            for batch in stream:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield batch.slice(start, BATCH_ROWS)


def _check_end(file: Path) -> None:
    """A file cut off between two batches looks whole to pyarrow, but lacks the end mark."""
    with open(file, "rb") as stream:
        stream.seek(-len(_STREAM_END), os.SEEK_END)
        if stream.read() != _STREAM_END:
            raise InputError(f"{file} is cut off; copy it again")


@contextmanager
def _explained(path: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        with explained(path, path):
            yield
    except (pa.ArrowException, MemoryError) as error:
        if isinstance(error, BatchwrightError):
            raise
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]:.300}") from error
