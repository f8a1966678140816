"""Columns and templates: what becomes a parameter, what a prompt, what passes through."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batchwright.errors import ConfigError, InputError, RequestError
from batchwright.job.formats.prompt_template import parse_template
from batchwright.job.formats.read_input import read_input
from batchwright.job.rows import CHAT, COMPLETIONS, EMBEDDINGS, InputRow, RowError
from batchwright.job.validate import parse_row

Read = Callable[..., list[InputRow | RowError]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a table given as CSV text or as records."""

    def read(table: str | list[dict[str, Any]], *column: str, **given: Any) -> list[Any]:
        path = tmp_path / ("in.csv" if isinstance(table, str) else "in.jsonl")
        if isinstance(table, str):
            path.write_text(table, encoding="utf-8")
        else:
            path.write_bytes(msgspec.json.Encoder().encode_lines(table))
        return list(read_input(str(path), column=column, **given))

    return read


def test_a_template_is_filled_and_other_columns_pass_through(read: Read) -> None:
    (row,) = read("text,stars,id\nNice,5,a\n", template="Classify {{x}}: {text}!")
    assert row == InputRow(
        2, "a", COMPLETIONS, {"prompt": "Classify {x}: Nice!"}, 9, {"stars": "5"}
    )


def test_columns_become_parameters(read: Read) -> None:
    (row,) = read(
        "question,limit,stops,key,note\nWhy?,7,\"[\"\"END\"\"]\",k,\n",
        "prompt=question", "max_tokens=limit", "stop=stops", "id=key",
    )  # fmt: skip
    assert (row.custom_id, row.extra) == ("k", {"note": ""})
    assert row.body == {"prompt": "Why?", "max_tokens": 7, "stop": ["END"]}
    assert parse_row(row).params.stop == ("END",)


def test_what_columns_are_called_is_enough_for_prompt_and_id(
    read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "batchwright"):
        (row,) = read("custom_id,prompt,temperature\na,Hi,20\n")
    assert (row.custom_id, row.body, row.extra) == ("a", {"prompt": "Hi"}, {"temperature": "20"})
    assert "--column temperature=temperature" in caplog.text


def test_messages_may_be_json_text_in_a_cell(read: Read) -> None:
    (row,) = read('messages\n"[{""role"":""user"",""content"":""Hi""}]"\n')
    assert (row.endpoint, row.body["messages"]) == (CHAT, [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}]}),
        (COMPLETIONS, {"prompt": "Hi"}),
        (EMBEDDINGS, {"input": "Hi"}),
    ],
)
def test_the_endpoint_says_what_a_prompt_is(
    read: Read, endpoint: str, body: dict[str, Any]
) -> None:
    for given in ({"template": "{t}"}, {"column": None}):
        columns = () if "template" in given else ("prompt=t",)
        (row,) = read("t\nHi\n", *columns, endpoint=endpoint, template=given.get("template"))
        assert (row.endpoint, row.body) == (endpoint, body)
        parse_row(row)
    (row,) = read([{"prompt": "Hi"}], endpoint=endpoint)
    assert row.body == body


def test_an_empty_id_column_asks_for_automatic_names(read: Read) -> None:
    rows = read("id,prompt\n7,a\n7,b\n", "id=")
    assert [row.custom_id for row in rows] == ["line-2", "line-3"]
    assert [row.extra for row in rows] == [{"id": "7"}, {"id": "7"}]
    first, second = read("id,prompt\n7,a\n7,b\n")
    assert isinstance(first, InputRow)
    assert second.error.code == "duplicate_custom_id"


def test_records_of_json_lines_are_tables_when_columns_are_named(read: Read) -> None:
    rows = read(
        [
            {"body": "one", "url": "x", "n": 2, "deep": {"a": [1]}},
            {"body": None, "url": "y"},
            {"url": "z"},
            {"body": 5, "id": None},
        ],
        template="Mail: {body}",
    )
    assert rows[0].extra == {"url": "x", "n": 2, "deep": {"a": [1]}}
    assert [row.error.message.split(",")[0] for row in rows[1:3]] == [
        "column 'body' is null",
        "column 'body' is missing",
    ]
    assert rows[1].extra == {"url": "y"}
    assert rows[3].body == {"prompt": "Mail: 5"}


def test_a_template_with_only_empty_cells_fails_its_row(read: Read) -> None:
    empty, half = read("a,b\n,\n,x\n", template="{a}{b}")
    assert "is empty" in empty.error.message
    assert half.body == {"prompt": "x"}


def test_an_empty_cell_gives_no_parameter_and_no_prompt(read: Read) -> None:
    first, second = read("p,m\nHi,\n,3\n", "prompt=p", "max_tokens=m")
    assert first.body == {"prompt": "Hi"}
    assert second.error.code == "missing_required_parameter"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"template": "{nothing}"}, "no column 'nothing'; it has text, stars"),
        ({"column": ["prompt=nothing"]}, "no column 'nothing'"),
        ({"column": ["prompt=text", "max_tokens=x"]}, "no column 'x'"),
        ({"column": ["prompt=text", "id=key"]}, "no column 'key'"),
        ({}, "--template"),
    ],
)
def test_a_missing_column_is_an_error_of_the_file(
    read: Read, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read("text,stars\na,b\n", *given.pop("column", ()), **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"column": ["prompt"]}, "PARAMETER=NAME"),
        ({"column": ["prompt="]}, "PARAMETER=NAME"),
        ({"column": ["prompt=a", "prompt=b"]}, "twice"),
        ({"column": ["prompt=a", "temprature=b"]}, "temperature"),
        ({"column": ["temprature=b"]}, "temperature"),
        ({"column": ["prompt=a"], "template": "{b}"}, "both give the prompt"),
        ({"endpoint": "/v1/x"}, "supported"),
        ({"template": "no column"}, "names no column"),
        ({"template": "a } b"}, "'}' at character 3"),
        ({"template": "{a} {"}, "at character 5"),
        ({"template": "{}"}, "at character 1"),
    ],
)
def test_a_wrong_mapping_is_told_at_once(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_input("there-is-no-such-file.csv", **given)


def test_parameters_that_fit_a_prompt_found_by_its_name_are_accepted(read: Read) -> None:
    (row,) = read([{"messages": [{"role": "user", "content": "Hi"}], "f": []}], "tools=f")
    assert row.endpoint == CHAT
    assert "tools" in row.body


@pytest.mark.parametrize(
    ("value", "text"),
    [("a{b}", "a{b}"), (3, "3"), (0.5, "0.5"), (True, "true"), ({"a": [None]}, '{"a":[null]}')],
)
def test_cells_in_templates(value: Any, text: str) -> None:
    assert parse_template("<{x}>").fill({"x": value}) == f"<{text}>"


def test_templates_reach_no_attributes() -> None:
    with pytest.raises(RequestError, match="missing"):
        parse_template("{x.__class__}").fill({"x": "a"})
