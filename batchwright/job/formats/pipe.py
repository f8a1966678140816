"""Lines of a pipe or a terminal, which may come slowly: whether the next one is there already.

io.BufferedReader cannot tell that without waiting.
"""

from __future__ import annotations

import os
import select
import stat

_READ_BYTES = 1 << 17


def is_pipe(fd: int) -> bool:
    """Whether what is read from a file descriptor may have to be waited for."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


class PipeLines:
    """Reads a file descriptor, which stays its owner's, by lines."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = b""  # what was read; all before _start was handed out
        self._start = 0
        self._ended = False

    def readline(self, size: int) -> bytes:
        """The next line with its line break, its first `size` bytes if it is longer; b"" at the
        end.

        Raises:
            OSError: it cannot be read.
        """
        pieces: list[bytes] = []
        while size > 0:
            end = self._data.find(b"\n", self._start, self._start + size) + 1
            piece = self._data[self._start : end or self._start + size]
            self._start += len(piece)
            size -= len(piece)
            pieces.append(piece)
            if end or (self._start == len(self._data) and not self._fill()):
                break
        return b"".join(pieces)

    def would_wait(self) -> bool:
        """Whether the next line, if there is one, has still to be written."""
        if self._ended or self._data.find(b"\n", self._start) >= 0:
            return False
        return not select.select([self._fd], [], [], 0)[0]

    def _fill(self) -> bool:
        """Read on; False at the end."""
        if not self._ended:
            self._data, self._start = os.read(self._fd, _READ_BYTES), 0
            self._ended = not self._data
        return not self._ended
