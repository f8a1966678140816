"""Reading CSV and TSV: the first record names the columns; quotes are those of RFC 4180.

CSV has no null and no types. An empty cell of a mapped column means that the row does not give that
parameter; in a template it is empty text. Numbers, booleans and lists are spelled as in JSON.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator

from batchwright.errors import InputError, RequestError
from batchwright.job.formats.column_map import ColumnMap
from batchwright.job.formats.columns import Columns
from batchwright.job.formats.openai_batch import without_mark
from batchwright.job.formats.source import MAX_LINE_BYTES, Source, read_lines
from batchwright.job.rows import InputRow, RowError

MAX_COLUMNS = 10_000


def read_csv(
    source: Source, given: ColumnMap, *, delimiter: str = ","
) -> Iterator[InputRow | RowError]:
    """Yield the rows of a table; a bad record is yielded as a RowError.

    Rows are numbered by the line they begin in.

    Raises:
        InputError: unreadable, no header, no rows, or a column is missing.
    """
    # A limit of the process, not of a reader; the real limit is on a record's bytes.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    lines = _Lines(source)
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    header = _header(records, source.name)
    columns = Columns(given, header, source.name, is_text=True)
    num_rows = 0
    while True:
        lines.begin_record()
        try:
            cells = next(records)
            if not cells:
                continue
            if len(cells) != len(header):
                raise _bad_record(f"has {len(cells)} cells; the header names {len(header)}")
        except StopIteration:
            break
        except (RequestError, csv.Error) as problem:
            error = problem if isinstance(problem, RequestError) else _bad_record(_words(problem))
            error.line = lines.first
            yield RowError(lines.first, None, error, lines.num_bytes())
        else:
            row = dict(zip(header, cells, strict=True))
            yield columns.row(lines.first, row, lines.num_bytes())
        num_rows += 1
    if num_rows == 0:
        raise InputError(f"{source.name} has no rows (empty_file); its header is all there is")


class _Lines:
    """Decoded lines for the csv module, which asks for as many as a record needs.

    Attributes:
        first: 1-based number of the record's first line.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lines = read_lines(source.stream)
        self._num_read = 0
        self._record_bytes = 0
        self.first = 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw, num_bytes = next(self._lines)
        self._num_read += 1
        self._record_bytes += num_bytes
        # Without a limit an unclosed quote would take in the rest of the file.
        if raw is None or self._record_bytes > MAX_LINE_BYTES:
            raise _bad_record(
                f"has {self._record_bytes} bytes or more; at most {MAX_LINE_BYTES} are read; "
                "shorten it, or close its quotes"
            )
        if self._num_read == 1:
            raw = without_mark(raw, self._source.name)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _bad_record(f"is not UTF-8 text: {error.reason}") from None

    def begin_record(self) -> None:
        self.first = self._num_read + 1
        self._record_bytes = 0

    def num_bytes(self) -> int:
        """Bytes of the input the record took."""
        progress = self._source.progress
        return self._record_bytes if progress is None else progress()


def _header(records: Iterator[list[str]], name: str) -> list[str]:
    try:
        header = next((record for record in records if record), [])
    except RequestError as error:
        raise InputError(f"{name} has no readable header: {error}") from None
    except csv.Error as error:
        raise InputError(f"{name} has no readable header: it {_words(error)}") from None
    if not header:
        raise InputError(f"{name} is empty (empty_file); its first line must name the columns")
    if len(header) > MAX_COLUMNS:
        raise InputError(f"{name} has {len(header)} columns; at most {MAX_COLUMNS} are read")
    column, count = Counter(header).most_common(1)[0]
    if count > 1:
        raise InputError(f"{name} has {count} columns called {column!r:.80}; rename them")
    return header


def _words(error: csv.Error) -> str:
    """What the csv module has to say, with a remedy where it lacks one."""
    text = str(error)
    if "new-line character" in text:
        return "has a carriage return outside quotes; save the file with LF or CRLF line ends"
    if "unexpected end of data" in text:
        return "opens a quote that is not closed"
    return f"is not valid CSV: {text}"


def _bad_record(problem: str) -> RequestError:
    return RequestError(f"the record {problem}", code="invalid_csv_record")
