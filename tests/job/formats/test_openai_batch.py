"""Reading batch files: good lines, odd files, and every kind of bad line."""

from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.errors import InputError
from batchwright.job.formats import source
from batchwright.job.formats.column_map import ColumnMap
from batchwright.job.formats.openai_batch import read_json_lines
from batchwright.job.formats.read_input import read_input
from batchwright.job.formats.row_names import with_names
from batchwright.job.formats.source import Source
from batchwright.job.rows import CHAT, COMPLETIONS, InputRow, RowError
from tests.job.fakes import chat_row, write_lines


def read(data: bytes) -> list[InputRow | RowError]:
    return list(with_names(read_json_lines(Source(BytesIO(data), "test"), ColumnMap())))


def one_error(row: Any) -> RowError:
    data = row if isinstance(row, bytes) else msgspec.json.encode(row)
    (found,) = read(data)
    assert isinstance(found, RowError)
    return found


def test_batch_lines_and_bare_rows(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "in.jsonl",
        [
            chat_row("a", "Hi", temperature=0),
            {"custom_id": "b", "url": COMPLETIONS, "body": {"prompt": "x"}},
            {"id": "c", "prompt": "x", "max_tokens": 3},
            {"id": 7, "messages": []},
            {"prompt_token_ids": [1, 2]},
            {"custom_id": "d", "prompt": "x"},
        ],
    )
    rows = list(read_input(str(path)))
    assert all(isinstance(row, InputRow) for row in rows)
    assert [
        (row.line, row.custom_id, row.endpoint) for row in rows if isinstance(row, InputRow)
    ] == [
        (1, "a", CHAT),
        (2, "b", COMPLETIONS),
        (3, "c", COMPLETIONS),
        (4, "7", CHAT),
        (5, "line-5", COMPLETIONS),
        (6, "d", COMPLETIONS),
    ]
    assert rows[2].body == {"prompt": "x", "max_tokens": 3}
    assert sum(row.num_bytes for row in rows) == path.stat().st_size


def test_mark_crlf_and_blank_lines_are_tolerated() -> None:
    rows = read(b'\xef\xbb\xbf{"id":"a","prompt":"x"}\r\n\r\n   \n{"id":"b","prompt":"y"}')
    assert [(row.line, row.custom_id) for row in rows] == [(1, "a"), (4, "b")]


def test_line_separators_of_unicode_do_not_split_rows() -> None:
    (row,) = read('{"id":"a","prompt":"one\u2028two\u0085three"}\n'.encode())
    assert isinstance(row, InputRow)
    assert row.body["prompt"] == "one\u2028two\u0085three"


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows_is_an_error_of_the_file(data: bytes) -> None:
    with pytest.raises(InputError, match="empty_file"):
        read(data)


def test_utf16_is_named() -> None:
    with pytest.raises(InputError, match="UTF-16"):
        read('{"prompt":"x"}'.encode("utf-16"))


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        list(read_input(str(tmp_path / "nothing.jsonl")))


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        (b"{", "invalid_json_line", "not valid JSON"),
        (b"\xff\xfa", "invalid_json_line", "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "invalid_json_line", "not valid JSON"),
        (b"[" * 100_000, "invalid_json_line", "nested too deeply"),
        ([1, 2], "invalid_json_line", "a list"),
        ("text", "invalid_json_line", "a string of 4 characters"),
        ({"url": CHAT, "body": {}}, "missing_required_parameter", "custom_id is missing"),
        (
            {"custom_id": 5, "url": CHAT, "body": {}},
            "invalid_request",
            "custom_id must be a string",
        ),
        ({"custom_id": "", "url": CHAT, "body": {}}, "invalid_request", "1 to 1000"),
        ({"custom_id": "x", "url": "/v1/x", "body": {}}, "url_mismatch", "supported: /v1/chat"),
        ({"custom_id": "x", "body": {}}, "url_mismatch", "url is None"),
        ({"custom_id": "x", "url": CHAT}, "missing_required_parameter", "body must be"),
        ({"custom_id": "x", "url": CHAT, "body": []}, "invalid_request", "not a list"),
        ({"custom_id": "x", "method": "GET", "url": CHAT, "body": {}}, "invalid_request", "GET"),
        (
            {"custom_id": "x", "url": CHAT, "body": {}, "n": 2},
            "unknown_parameter",
            "inside the body",
        ),
        ({"id": True, "prompt": "x"}, "invalid_request", "id must be a string"),
        ({"id": "x", "custom_id": "y", "prompt": "x"}, "invalid_request", "not both"),
    ],
)
def test_bad_lines_fail_alone(row: Any, code: str, words: str) -> None:
    found = one_error(row)
    assert found.error.code == code
    assert words in found.error.message
    assert found.error.line == found.line == 1


def test_a_second_use_of_an_id_fails_and_the_first_stands() -> None:
    first, second, third = read(b'{"id":"a","prompt":"x"}\n{"id":"a","prompt":"y"}\n{"prompt":"z"}')
    assert isinstance(first, InputRow)
    assert isinstance(second, RowError)
    assert (second.error.code, second.custom_id) == ("duplicate_custom_id", "a")
    assert isinstance(third, InputRow)


def test_an_overlong_line_is_skipped_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_LINE_BYTES", 100)
    long = b'{"prompt": "' + b"x" * 1000 + b'"}\n'
    exact = b'{"id":"e","prompt":"'
    exact += b"y" * (97 - len(exact)) + b'"}\n'
    assert len(exact) == 100
    rows = read(long + exact + b'{"prompt": "z"}\n')
    assert [type(row).__name__ for row in rows] == ["RowError", "InputRow", "InputRow"]
    assert rows[0].num_bytes == len(long)
    assert "100" in rows[0].error.message
    assert [row.line for row in rows] == [1, 2, 3]


@given(st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=8))
def test_any_bytes_give_one_entry_per_line_that_is_not_blank(lines: list[bytes]) -> None:
    data = b"\n".join([b'{"prompt":"x"}', *lines])
    rows = read(data)
    assert len(rows) == 1 + sum(bool(line.strip()) for line in lines)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
row_keys = st.sampled_from(["custom_id", "id", "method", "url", "body", "prompt", "messages"])


@given(st.dictionaries(row_keys | st.text(max_size=3), json_values))
def test_any_object_is_a_row_or_a_row_error(row: dict[str, Any]) -> None:
    try:
        data = msgspec.json.encode(row)
    except (UnicodeEncodeError, ValueError):
        return
    (found,) = read(data)
    assert found.line == 1


def test_automatic_names_keep_clear_of_given_ones() -> None:
    rows = read(
        b'{"id":"line-2","prompt":"a"}\n{"prompt":"b"}\n{"prompt":"c"}\n{"id":"line-3","prompt":"d"}'
    )
    assert [row.custom_id for row in rows[:3]] == ["line-2", "line-2-2", "line-3"]
    assert isinstance(rows[3], RowError)
    assert "if it gives none" in rows[3].error.message
