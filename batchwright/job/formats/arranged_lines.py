"""Lines of a long file in an order over the whole file, not just over the rows in the engine.

The engine orders the rows it has, a few thousand. Rows that share a prompt's beginning may stand
further apart than that; brought together, they share it. So after the first rows, which run
meanwhile, the rest of the file is read once for outlines (no text is kept), these are ordered, and
the lines are read again one by one, in that order. A longer file is done in sections.

What becomes of a row does not depend on the order: rows whose name or model depends on rows before
them, and bad ones, come last, as they stand in the file. The order follows from the file alone, so
a job that goes on has the same one.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from batchwright.errors import InputError
from batchwright.job.formats.column_map import ColumnMap
from batchwright.job.formats.lines import Line, numbered_lines
from batchwright.job.formats.openai_batch import LineReader
from batchwright.job.formats.outline import TOKENS_PER_PIECE, outline
from batchwright.job.formats.row_names import automatic_name, with_names
from batchwright.job.formats.source import MAX_LINE_BYTES, open_binary
from batchwright.job.rows import UNNAMED, AnyRow, InputRow
from batchwright.plan.job_tree import JobTree, build_job_tree
from batchwright.plan.order import JobFacts, Order, OrderFunction
from batchwright.plan.orders.fcfs import fcfs
from batchwright.request import Int32Array

FIRST_ROWS = 1024
"""Lines that come as they stand in the file, for the engine to run while the others are looked at.
What these share with later rows may have to be computed twice, so they are few."""

SECTION_ROWS = 1_000_000
SECTION_PIECES = 64_000_000  # 256 MB


@dataclass(slots=True)
class Arrangement:
    """How the lines of a file are ordered; may be set until the first rows have been read.

    Attributes:
        order: a function of `plan/orders`; `fcfs` leaves the file as it is.
    """

    order: OrderFunction = fcfs


def arranged_lines(path: str, given: ColumnMap, arrangement: Arrangement) -> Iterator[Line]:
    """All lines of a file that is not compressed, each once, but for blank ones.

    Raises:
        InputError: the file changed while it was read.
        OSError: it cannot be read.
    """
    with open_binary(path) as stream:
        lines = numbered_lines(stream)
        yield from islice(lines, FIRST_ROWS)
        if arrangement.order is fcfs:
            yield from lines
            return
        with open_binary(path) as again:
            reader = LineReader(path, given)
            for section in _sections(numbered_lines(again), reader):
                for index in section.arranged(arrangement.order):
                    yield section.read(index, stream.fileno(), path)


class _Section:
    """Outlines of lines, and where these are in the file."""

    def __init__(self) -> None:
        self._number = array("q")
        self._offset = array("q")
        self._num_bytes = array("q")
        self._check = array("I")
        self._sound = array("q")  # indices of lines that may come in any order
        self._others = array("q")
        self._num_prompt = array("q")  # of those that are sound, as what follows
        self._num_output = array("q")
        self._pieces = array("I")
        self._piece_ends = array("q", [0])

    @property
    def is_full(self) -> bool:
        """Whether the next line belongs to another section."""
        return len(self._number) >= SECTION_ROWS or len(self._pieces) >= SECTION_PIECES

    def add(self, line: _Seen, row: InputRow | None) -> None:
        """Add a line and, if it may come in any order, its row."""
        index = len(self._number)
        self._number.append(line.number)
        self._offset.append(line.offset)
        self._num_bytes.append(line.num_bytes)
        self._check.append(line.check)
        if row is None:
            self._others.append(index)
            return
        pieces, num_prompt, num_output = outline(row)
        self._sound.append(index)
        self._num_prompt.append(num_prompt)
        self._num_output.append(num_output)
        self._pieces.extend(pieces)
        self._piece_ends.append(len(self._pieces))

    def arranged(self, order: OrderFunction) -> Iterator[int]:
        """Indices of all lines, in the order in which they are to come."""
        facts = JobFacts(
            num_prompt_tokens=np.array(self._num_prompt, np.int64),
            num_output_tokens=np.array(self._num_output, np.float64),
            make_tree=self._tree,
        )
        rows = _in_one_line(order(facts)).tolist()
        self._pieces, self._piece_ends = array("I"), array("q", [0])
        sound, self._sound = self._sound, array("q")
        yield from (sound[row] for row in rows)
        yield from self._others

    def read(self, index: int, file: int, name: str) -> Line:
        """A line, read again.

        Raises:
            InputError: it is another one now.
        """
        number, num_bytes = self._number[index], self._num_bytes[index]
        if num_bytes > MAX_LINE_BYTES:
            return Line(number, None, num_bytes)
        raw = os.pread(file, num_bytes, self._offset[index])
        if len(raw) != num_bytes or zlib.crc32(raw) != self._check[index]:
            raise InputError(
                f"{name} changed in line {number} while it was read; run the command again"
            )
        return Line(number, raw, num_bytes)

    def _tree(self) -> JobTree:
        pieces = np.frombuffer(self._pieces, np.int32)
        tree = build_job_tree(pieces, np.array(self._piece_ends, np.int64))
        return replace(tree, depth=tree.depth * np.int32(TOKENS_PER_PIECE))


@dataclass(frozen=True, slots=True)
class _Seen:
    """A line that was read for its outline."""

    number: int
    offset: int
    num_bytes: int
    check: int
    row: AnyRow


def _sections(lines: Iterator[Line], reader: LineReader) -> Iterator[_Section]:
    """The outlines of a file's lines after the first ones."""
    section = _Section()
    unnamed: deque[_Seen] = deque()  # names are given to some hundred rows at once
    model: object = None
    for named in with_names(_rows(lines, reader, unnamed)):
        seen = unnamed.popleft()
        if model is None and isinstance(named, InputRow):
            model = named.body.get("model")
        if seen.number <= FIRST_ROWS:
            continue
        section.add(seen, _free_row(seen.row, named, model))
        if section.is_full:
            yield section
            section = _Section()
    yield section


def _rows(lines: Iterator[Line], reader: LineReader, seen: deque[_Seen]) -> Iterator[AnyRow]:
    """The rows of the lines; each is noted as seen before it is given out."""
    offset = 0
    for line in lines:
        row = reader.row_of(line)
        if row is not None:
            check = zlib.crc32(line.raw or b"")
            seen.append(_Seen(line.number, offset, line.num_bytes, check, row))
            yield row
        offset += line.num_bytes


def _free_row(row: AnyRow, named: AnyRow, first_model: object) -> InputRow | None:
    """The row if what becomes of it does not depend on those before it, and it is not bad."""
    if not isinstance(row, InputRow) or not isinstance(named, InputRow):
        return None
    if row.custom_id == UNNAMED and named.custom_id != automatic_name(row):
        return None
    return named if named.body.get("model") in (None, first_model) else None


def _in_one_line(order: Order) -> Int32Array:
    """Rows that are to be started from both ends in turns: both kinds are at hand then, and the
    engine, which knows how much memory is in use, chooses."""
    if order.units is None:
        return order.rows
    half = -(-len(order.rows) // 2)
    line = np.empty_like(order.rows)
    line[::2], line[1::2] = order.rows[:half], order.rows[: half - 1 : -1]
    return line
