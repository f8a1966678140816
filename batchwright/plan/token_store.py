"""TokenStore: the tokens of many prompts in one array, in memory or, when they are many, on disk.

Four bytes a token and eight a prompt, no object for either; text is not kept. Beyond a threshold
the tokens go to a temporary file without a name, which is gone when the store is, however the
process ends; pages of it that are read are the system's to keep or drop.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from types import TracebackType

import numpy as np
import numpy.typing as npt

from batchwright.errors import ResourceError
from batchwright.request import Int32Array

Int64Array = npt.NDArray[np.int64]

SPILL_BYTES = 512 * 2**20
WRITE_BYTES = 4 * 2**20
"""Tokens are gathered to writes of this size once they go to disk."""


class TokenStore:
    """Grows at its end; rows are numbered in the order they came.

    Args:
        spill_bytes: tokens beyond so many bytes go to disk, and those before with them.
        directory: where the temporary file lies; by default that of the system (TMPDIR).
    """

    def __init__(self, spill_bytes: int = SPILL_BYTES, directory: str | None = None) -> None:
        self._spill_bytes = spill_bytes
        self._directory = directory
        self._offsets = array("q", [0])
        self._tail = array("i")  # in memory: all tokens; on disk: those not written yet
        self._fd: int | None = None
        self._num_written = 0  # tokens in the file
        self._mapped: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return self._offsets[-1]

    @property
    def is_spilled(self) -> bool:
        """Whether the tokens are on disk."""
        return self._fd is not None

    @property
    def offsets(self) -> Int64Array:
        """[num_rows + 1]; row i owns tokens [offsets[i], offsets[i + 1])."""
        return np.array(self._offsets, np.int64)

    def append(self, token_ids: Int32Array) -> None:
        """Add a row.

        Raises:
            ResourceError: the disk is full, or no temporary file can be made.
        """
        self._tail.frombytes(np.ascontiguousarray(token_ids, np.int32).tobytes())
        self._offsets.append(self._offsets[-1] + len(token_ids))
        num_bytes = 4 * len(self._tail)
        if num_bytes > (self._spill_bytes if self._fd is None else WRITE_BYTES):
            self._write_out()

    def tokens(self) -> Int32Array:
        """[num_tokens] all tokens, a view: no row can be added while it is held."""
        if self._fd is None:
            return np.frombuffer(self._tail, np.int32)
        self._write_out()
        if self._mapped is None:
            self._mapped = mmap.mmap(self._fd, 4 * self._num_written, prot=mmap.PROT_READ)
        return np.frombuffer(self._mapped, np.int32)

    def close(self) -> None:
        """Give the memory and the file back. Arrays handed out stay valid."""
        self._mapped = None  # unmapped when the last array is gone
        self._tail = array("i")
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _write_out(self) -> None:
        try:
            if self._fd is None:
                self._fd = _unnamed_file(self._directory)
            data = memoryview(self._tail).cast("B")
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            folder = self._directory or tempfile.gettempdir()
            raise ResourceError(
                f"{4 * self.num_tokens} bytes of tokens do not fit in {folder}: "
                f"{error.strerror or error}; free some space there, or set TMPDIR to a directory "
                "that has more"
            ) from error
        self._num_written += len(self._tail)
        self._tail = array("i")
        self._mapped = None


def _unnamed_file(directory: str | None) -> int:
    fd, path = tempfile.mkstemp(prefix="batchwright-tokens-", dir=directory)
    os.unlink(path)
    return fd
