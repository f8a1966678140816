"""Projections: result lines as the file a user asked for, by its suffix.

`.jsonl` and anything unknown: the lines as they are; `.csv`, `.tsv`, `.parquet`: tables (see
`result_table.py`); `.gz` and `.zst` after a text format: compressed; `-`: standard output.
A file is written beside its place, synced and renamed, so it is always whole, the old one or the
new; it is readable by its owner only. Memory is bounded by a row group.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any

from batchwright.errors import ConfigError, InputError, OutputError
from batchwright.job.durable import sync_directory, write_all
from batchwright.job.formats.result_table import TableShape, table_rows
from batchwright.job.formats.source import (
    COMPRESSED,
    file_system,
    is_url,
    need_package,
    text_suffix,
)
from batchwright.job.formats.table_files import write_csv, write_parquet

STDOUT = "-"
ZSTD_LEVEL = 3

_TABLES = (".csv", ".tsv", ".parquet")


def output_kind(path: str) -> str:
    """The form a path asks for: "jsonl", "csv", "tsv" or "parquet", then ".gz" or ".zst" if
    compressed. Only "jsonl" on a local disk can be written line by line; a URL is "jsonl.url"."""
    if path == STDOUT:
        return "jsonl"
    suffix, last = text_suffix(path), PurePath(path).suffix.lower()
    form = suffix[1:] if suffix in _TABLES else "jsonl"
    if last in COMPRESSED:
        return form + last
    return form + ".url" if is_url(path) and form == "jsonl" else form


def check_output(path: str) -> None:
    """Fail before the job if its output could not be written at its end.

    Raises:
        ConfigError: a package is missing, or the form makes no sense.
    """
    kind = output_kind(path)
    if kind in ("parquet.gz", "parquet.zst"):
        raise ConfigError(f"{path}: Parquet is compressed inside; name it .parquet")
    try:
        _need_packages(path, kind)
        if is_url(path):
            file_system(path)
    except InputError as error:
        raise ConfigError(str(error)) from None


def write_projection(path: str, lines: Iterable[bytes], *, kind: str | None = None) -> None:
    """Replace a file by result lines in the form of its suffix.

    Args:
        path: the file, a URL, or `-`.
        lines: JSON lines, each with its newline. Tables look at them twice: an iterator is copied
            to a temporary file first, anything that can be iterated again is not.
        kind: another form than the path's, as `output_kind` names them.
    Raises:
        OutputError: it cannot be written; the file that was there is as it was.
    """
    kind = kind or output_kind(path)
    with _explained(path):
        _need_packages(path, kind)
        if path == STDOUT:
            for line in lines:
                write_all(1, line)
        elif is_url(path):
            with tempfile.NamedTemporaryFile(suffix=".part") as part:
                _write(part, lines, kind, Path(tempfile.gettempdir()))
                part.flush()
                system, remote = file_system(path)
                system.put_file(part.name, remote)
        else:
            _write_file(Path(path), lines, kind)


def remove_projection(path: str) -> None:
    """Delete a file or an object, if it is there.

    Raises:
        OutputError: it cannot be deleted.
    """
    with _explained(path):
        if not is_url(path):
            if os.path.isfile(path):
                os.unlink(path)
            return
        system, remote = file_system(path)
        if system.isfile(remote):
            system.rm(remote)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what writing can raise into an OutputError that names the path."""
    try:
        yield
    except (OutputError, InputError) as error:
        raise OutputError(str(error)) from error
    except Exception as error:  # drivers of object stores have exceptions of their own
        if not isinstance(error, OSError) and not is_url(path):
            raise
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}") from error


def _need_packages(path: str, kind: str) -> None:
    if kind == "parquet":
        need_package("pyarrow", "parquet", path)
    if kind.endswith(".zst"):
        need_package("zstandard", "zstd", path)


def _write_file(path: Path, lines: Iterable[bytes], kind: str) -> None:
    if path.exists() and not path.is_file():  # a device or a pipe: there is nothing to replace
        with open(path, "wb") as device:
            _write(device, lines, kind, Path(tempfile.gettempdir()))
        return
    path = path.resolve()  # the file that a link names is replaced, not the link
    part = path.with_name(path.name + ".part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as stream:
            os.fchmod(fd, 0o600)
            _write(stream, lines, kind, path.parent)
            stream.flush()
            os.fsync(fd)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _write(stream: IO[bytes], lines: Iterable[bytes], kind: str, folder: Path) -> None:
    form, _, compression = kind.partition(".")
    with _compressed(stream, compression) as target:
        if form == "jsonl":
            for line in lines:
                target.write(line)
            return
        with _twice(lines, folder) as again:
            shape = TableShape()
            for line in again:
                shape.note(line)
            rows = table_rows(again, shape)
            if form == "parquet":
                write_parquet(target, rows, shape)
            else:
                write_csv(target, rows, shape, delimiter="\t" if form == "tsv" else ",")


@contextmanager
def _compressed(stream: IO[bytes], compression: str) -> Iterator[IO[bytes]]:
    if compression == "gz":
        # Neither name nor time inside: the same lines give the same bytes.
        with gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as zipped:
            yield zipped  # type: ignore[misc]  # the one class of the library that is not an IO
    elif compression == "zst":
        import zstandard

        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        with compressor.stream_writer(stream, closefd=False) as zstd:
            yield zstd
    else:
        yield stream


@contextmanager
def _twice(lines: Iterable[bytes], folder: Path) -> Iterator[Iterable[bytes]]:
    if not isinstance(lines, Iterator):
        yield lines
        return
    with tempfile.TemporaryFile(dir=folder) as copy:
        copy.writelines(lines)
        yield _Rewound(copy)


class _Rewound:
    """Lines of a temporary file, from its start each time."""

    def __init__(self, file: IO[Any]) -> None:
        self._file = file

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        return iter(self._file)
