"""Lines of a text input, with their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, NamedTuple

from batchwright.job.formats.pipe import PipeLines
from batchwright.job.formats.source import read_lines


class Line(NamedTuple):
    """A line of an input.

    Attributes:
        number: counted from 1.
        raw: its bytes; None if it is longer than lines may be.
        num_bytes: that it takes in the file.
    """

    number: int
    raw: bytes | None
    num_bytes: int


def numbered_lines(stream: IO[bytes] | PipeLines) -> Iterator[Line]:
    """All lines, as they come."""
    for number, (raw, num_bytes) in enumerate(read_lines(stream), start=1):
        yield Line(number, raw, num_bytes)
