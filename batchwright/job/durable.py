"""Writing files so that they are whole, private, and on the disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from batchwright.errors import OutputError


def write_private(path: Path, data: bytes) -> None:
    """Replace a file by `data` in one go, durably, readable by its owner only.

    Raises:
        OutputError: it cannot be written; the old file, if any, is as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(part, path)
        sync_directory(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_all(fd: int, data: bytes) -> None:
    """os.write until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_directory(path: Path) -> None:
    """Make names in a directory durable, where the file system can."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # some network file systems cannot; files are synced
        os.fsync(fd)
    os.close(fd)
