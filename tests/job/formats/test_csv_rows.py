"""CSV and TSV: what the format allows, and records that fail alone."""

from io import BytesIO

import pytest

from batchwright.errors import InputError
from batchwright.job.formats import csv_rows, source
from batchwright.job.formats.column_map import parse_columns
from batchwright.job.formats.csv_rows import read_csv
from batchwright.job.formats.row_names import with_names
from batchwright.job.formats.source import Source
from batchwright.job.rows import InputRow, RowError


def read(data: bytes, delimiter: str = ",") -> list[InputRow | RowError]:
    return list(
        with_names(read_csv(Source(BytesIO(data), "test"), parse_columns(), delimiter=delimiter))
    )


def prompts(rows: list[InputRow | RowError]) -> list[str]:
    return [row.body["prompt"] if isinstance(row, InputRow) else row.error.message for row in rows]


def test_quotes_newlines_marks_and_blank_lines() -> None:
    data = '\ufeffid,prompt\r\na,"one, ""two""\r\nthree"\r\n\r\nb, é \r\n'.encode()
    rows = read(data)
    assert [(row.line, row.custom_id) for row in rows] == [(2, "a"), (5, "b")]
    assert prompts(rows) == ['one, "two"\r\nthree', " é "]
    assert sum(row.num_bytes for row in rows) == len(data) - len("\ufeffid,prompt\r\n\r\n".encode())


def test_tabs() -> None:
    assert prompts(read(b"id\tprompt\na\tone, two\n", "\t")) == ["one, two"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (b"a", "1 cells; the header names 2"),
        (b"a,b,c", "3 cells"),
        (b'a,"b"c', "not valid CSV"),
        (b"a,b\rc,d", "carriage return"),
        (b"a,\xff", "not UTF-8"),
    ],
)
def test_a_bad_record_fails_alone(record: bytes, words: str) -> None:
    first, bad, last = read(b"id,prompt\nx,1\n" + record + b"\ny,2\n")
    assert isinstance(bad, RowError)
    assert bad.error.code == "invalid_csv_record"
    assert words in bad.error.message
    assert bad.error.line == bad.line == 3
    assert prompts([first, last]) == ["1", "2"]


def test_an_open_quote_at_the_end_is_named() -> None:
    assert "not closed" in prompts(read(b'prompt\n"a\nb\n'))[0]


def test_an_open_quote_takes_in_no_more_than_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "MAX_LINE_BYTES", 100)
    bad, *rest = read(b'prompt\n"' + b"a b c d e\n" * 12 + b"last\n")
    assert isinstance(bad, RowError)
    assert "close its quotes" in bad.error.message
    assert prompts(rest) == ["a b c d e", "a b c d e", "last"]


def test_an_overlong_line_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_LINE_BYTES", 100)
    bad, good = read(b"prompt\n" + b"x" * 1000 + b"\nfine\n")
    assert "1001 bytes" in prompts([bad])[0]
    assert prompts([good]) == ["fine"]


def test_a_cell_may_be_longer_than_the_modules_own_limit() -> None:
    (row,) = read(b"prompt\n" + b"x" * 200_000 + b"\n")
    assert isinstance(row, InputRow)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty_file"),
        (b"\n\r\n", "empty_file"),
        (b"prompt\n", "empty_file"),
        (b"a,prompt,a\n", "2 columns called 'a'"),
        (b'"prompt\nx', "no readable header"),
        (b"id,prompt\ra,b", "LF or CRLF line ends"),
        ("prompt\n".encode("utf-16"), "UTF-16"),
        (b"," * 20_000, "at most 10000"),
    ],
)
def test_a_file_that_is_no_table(data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(data)
