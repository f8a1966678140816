"""Whether reading a file allocates no more than its size allows."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

BYTES_PER_BYTE = 64  # a string of one byte and its length, 9 bytes in a file, is an object of 50
BYTES_MORE = 1 << 20  # messages, and what is imported at the first call


@contextmanager
def allocates_in_proportion(num_bytes: int) -> Iterator[None]:
    """Fail if Python and NumPy allocate too much for a file of this size in the context."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    limit = BYTES_PER_BYTE * num_bytes + BYTES_MORE
    assert peak <= limit, f"{peak} bytes were allocated for a file of {num_bytes}"


def file_of(data: bytes, name: str) -> Path:
    """A file with these bytes, written anew: what is mapped of an earlier one stays as it was."""
    path = _folder() / name
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


@cache
def _folder() -> Path:
    """A folder of this process, in memory where there is one."""
    shared = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
