"""Dequantised GGUF weights, written once to a file that later runs map.

The file is an ordinary safetensors file in the user's cache directory, named after the checkpoint's
fingerprint and FORMAT_VERSION. It replaces dequantising by mapping, and all processes of a machine
share its pages. It is only ever a copy: if it cannot be written or read, weights are dequantised
again and a log line says why.

What is checked before it is used: that only the user can write there, that the library accepts it
(its size matches its header), that it names this fingerprint and version, and that it has exactly
the expected tensors. Data is flushed to the disk before the file gets its name, so a crash leaves
none or a whole one. A file whose data was changed in place is not noticed.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from batchwright.errors import ModelFormatError
from batchwright.user_cache import user_cache_directory
from batchwright.weights.gguf_checkpoint import GgufCheckpoint
from batchwright.weights.safetensors_file import (
    open_safetensors,
    read_tensor,
    stored_bytes,
    write_safetensors,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raise it when the same GGUF file must give other tensors than before."""

_PART_SUFFIX = ".part"
_STALE_PART_S = 24 * 3600


def cache_directory() -> Path | None:
    """Return the directory for weights, or None if the user has no home."""
    return user_cache_directory("weights")


@dataclass(frozen=True)
class CachedCheckpoint:
    """A GGUF checkpoint whose tensors come from the cache file, which is made at the first use."""

    source: GgufCheckpoint
    directory: Path

    @property
    def path(self) -> Path:
        """The .gguf file."""
        return self.source.path

    @property
    def config(self) -> dict[str, Any]:
        """See `Checkpoint`."""
        return self.source.config

    @property
    def generation_config(self) -> dict[str, Any]:
        """See `Checkpoint`."""
        return self.source.generation_config

    @property
    def fingerprint(self) -> str:
        """See `Checkpoint`."""
        return self.source.fingerprint

    def names(self) -> list[str]:
        """See `Checkpoint`."""
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self.source.shape(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a fp32 tensor, a private view of the cache file or freshly dequantised."""
        if self._mapped is None or name not in self._shapes:
            return self.source.tensor(name)
        return read_tensor(self._mapped, self.file, name)

    @property
    def file(self) -> Path:
        """The cache file, which may not exist."""
        return self.directory / f"{self.fingerprint}-v{FORMAT_VERSION}.safetensors"

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self.names()}

    @cached_property
    def _mapped(self) -> Any | None:
        """The open cache file, or None if it cannot be had."""
        metadata = {"fingerprint": self.fingerprint, "version": str(FORMAT_VERSION)}
        try:
            _make_private(self.directory)
            if self.file.is_file():
                handle = _open_checked(self.file, self._shapes, metadata)
                if handle is not None:
                    return handle
            _make_room(self.directory, stored_bytes(self._shapes))
            _write(self.file, self._shapes, self.source, metadata)
        except OSError as error:
            logger.warning("weights are not cached in %s: %s", self.directory, error)
            return None
        return _open_checked(self.file, self._shapes, metadata)


def _open_checked(
    file: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]
) -> Any | None:
    """Map a cache file if it is whole and is the one expected, else say why not."""
    try:
        handle = open_safetensors(file)
    except ModelFormatError as error:
        logger.warning("rebuilding a damaged cache file: %s", error)
        return None
    found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    if handle.metadata() != metadata or found != shapes:
        logger.warning("rebuilding %s: it does not hold the expected tensors", file)
        return None
    return handle


def _make_private(directory: Path) -> None:
    """Make the directory if needed and check that nobody else could have put weights there.

    Raises:
        OSError: it cannot be made, or others can write to it or to its parent.
    """
    for folder in (directory.parent, directory):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        is_ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
        if not is_ours or stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"other users can write to {folder}")


def _make_room(directory: Path, num_bytes: int) -> None:
    """Remove what killed processes left, and check that the file may be written.

    Raises:
        OSError: the file would take more than half of the free space.
    """
    for part in directory.glob(f"*{_PART_SUFFIX}"):
        if time.time() - part.stat().st_mtime > _STALE_PART_S:
            part.unlink(missing_ok=True)
    free = shutil.disk_usage(directory).free
    if num_bytes > free // 2:
        raise OSError(f"{num_bytes} bytes are needed, at most half of the {free} free are taken")


def _write(
    file: Path,
    shapes: dict[str, tuple[int, ...]],
    source: GgufCheckpoint,
    metadata: dict[str, str],
) -> None:
    """Write the file under another name, then give it its own in one step."""
    start = time.perf_counter()
    descriptor, part_name = tempfile.mkstemp(suffix=_PART_SUFFIX, dir=file.parent)
    os.close(descriptor)
    part = Path(part_name)
    try:
        write_safetensors(part, shapes, source.tensor, metadata)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    logger.info(
        "cached dequantised weights in %s: %.0f MB in %.1f s",
        file,
        file.stat().st_size / 1e6,
        time.perf_counter() - start,
    )
