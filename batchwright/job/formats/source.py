"""Bytes of an input, wherever they lie: a file, standard input, an object store; compressed or not.

Whatever goes wrong with them becomes an InputError that names the file. Decompression is bounded:
a small file that stands for terabytes costs time, not memory.
"""

from __future__ import annotations

import gzip
import importlib
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO, Any

from batchwright.errors import BatchwrightError, InputError, RequestError
from batchwright.job.formats.pipe import PipeLines, is_pipe

STDIN = "-"
COMPRESSED = (".gz", ".zst")
MAX_LINE_BYTES = 64 * 1024 * 1024

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_BUFFER_BYTES = 1 << 17
_ZSTD_FEED_BYTES = 512  # of compressed data at a time: they stand for 22 MB at the very most


@dataclass(frozen=True, slots=True)
class Source:
    """An open input.

    Attributes:
        stream: its bytes, decompressed.
        name: what messages call it.
        progress: bytes of the file read since the last call; None if they are those of the stream.
        would_wait: whether the next line has to be waited for; None if there is never a wait.
    """

    stream: IO[bytes] | PipeLines
    name: str
    progress: Callable[[], int] | None = None
    would_wait: Callable[[], bool] | None = None


def is_url(path: str) -> bool:
    """Whether a path names something in an object store, such as s3://bucket/file."""
    return _URL.match(path) is not None


def text_suffix(path: str) -> str:
    """The suffix that tells a file's format, in lower case, without .gz or .zst."""
    pure = PurePath(path)
    if pure.suffix.lower() in COMPRESSED:
        pure = pure.with_suffix("")
    return pure.suffix.lower()


@contextmanager
def open_source(path: str) -> Iterator[Source]:
    """Open an input for reading; `-` is standard input.

    Raises:
        InputError: it is missing or unreadable, also later while it is read in this context.
    """
    name = "standard input" if path == STDIN else path
    with explained(path, name):
        if path == STDIN:
            yield _standard_input(name)
            return
        with open_binary(path) as raw:
            suffix = PurePath(path).suffix.lower()
            if suffix == ".gz":
                yield Source(
                    io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER_BYTES), name, _delta(raw)
                )
            elif suffix == ".zst":
                need_package("zstandard", "zstd", path)
                yield Source(io.BufferedReader(_ZstdReader(raw), _BUFFER_BYTES), name, _delta(raw))
            else:
                yield Source(raw, name)


def _standard_input(name: str) -> Source:
    stream = sys.stdin.buffer
    try:
        fd = stream.fileno()
    except OSError:  # somebody has put something else in its place
        return Source(stream, name)
    if not is_pipe(fd):
        return Source(stream, name)
    lines = PipeLines(fd)
    return Source(lines, name, would_wait=lines.would_wait)


def open_binary(path: str) -> IO[bytes]:
    """Open a file or, through fsspec, an object."""
    if not is_url(path):
        return open(path, "rb", buffering=_BUFFER_BYTES)
    stream: IO[bytes] = file_system(path)[0].open(path, "rb")
    return stream


def file_system(url: str) -> tuple[Any, str]:
    """(the fsspec file system of a URL, the path in it).

    Raises:
        InputError: fsspec or the driver is not installed.
    """
    protocol = url.partition("://")[0]
    packages = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
    packages |= {"http": "aiohttp", "https": "aiohttp"}
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(
            f"{url}: {protocol}:// needs a package: "
            f"pip install fsspec {packages.get(protocol, '')}".rstrip()
        ) from error
    return system, str(path)


def need_package(module: str, extra: str, path: str) -> None:
    """Fail if a package that a path's format needs is not installed.

    Raises:
        InputError: with the command that installs it.
    """
    try:
        importlib.import_module(module)
    except ImportError:
        raise InputError(f"{path} needs {module}: pip install 'batchwright[{extra}]'") from None


@contextmanager
def explained(path: str, name: str) -> Iterator[None]:
    """Turn what reading can raise into an InputError that names the input."""
    try:
        yield
    except BatchwrightError:
        raise
    except Exception as error:  # drivers of object stores have exceptions of their own
        if not is_url(path) and not isinstance(error, OSError | EOFError | zlib.error):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"cannot read {name}: {reason}") from error


def read_lines(stream: IO[bytes] | PipeLines) -> Iterator[tuple[bytes | None, int]]:
    """Lines and their sizes in bytes. A line over MAX_LINE_BYTES is skipped and given as None."""
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        if len(raw) <= MAX_LINE_BYTES:
            yield raw, len(raw)
            continue
        num_bytes = len(raw)
        while raw and not raw.endswith(b"\n"):
            raw = stream.readline(MAX_LINE_BYTES + 1)
            num_bytes += len(raw)
        yield None, num_bytes


def too_long(num_bytes: int) -> RequestError:
    """The error of a line that was skipped."""
    return RequestError(
        f"line has {num_bytes} bytes; at most {MAX_LINE_BYTES} are read; shorten it",
        code="invalid_json_line",
    )


def _delta(raw: IO[bytes]) -> Callable[[], int]:
    """How far a file was read since the last call."""
    before = 0

    def progress() -> int:
        nonlocal before
        start, before = before, raw.tell()
        return before - start

    return progress


class _ZstdReader(io.RawIOBase):
    """Decompresses Zstandard, frame after frame. A file that ends within a frame is an error; the
    library's own reader takes it for the end."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._raw = raw
        self._frame: Any = None
        self._compressed = memoryview(b"")
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = memoryview(self._raw.read(1 << 16))
                if not self._compressed:
                    if self._frame is not None:
                        raise EOFError("the compressed file ends too early")
                    return 0
            self._decompress()
        num_bytes = min(len(buffer), len(self._ready))
        buffer[:num_bytes] = self._ready[:num_bytes]
        self._ready = self._ready[num_bytes:]
        return num_bytes

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        piece = self._compressed[:_ZSTD_FEED_BYTES]
        try:
            self._ready = memoryview(self._frame.decompress(piece))
        except self._error as error:
            raise OSError(str(error)) from error
        num_unused = 0
        if self._frame.eof:
            num_unused = len(self._frame.unused_data)
            self._frame = None
        self._compressed = self._compressed[len(piece) - num_unused :]
