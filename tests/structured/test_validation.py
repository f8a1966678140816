"""From a row's parameters to a GrammarSpec: what is read, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batchwright.errors import RequestError
from batchwright.request import SamplingParams
from batchwright.structured import spec as specs
from batchwright.structured.spec import GrammarKind, GrammarSpec
from batchwright.validation.params import check_params, validate_params
from batchwright.validation.structured import MAX_CHOICES, MAX_GRAMMAR_CHARS, MAX_GRAMMAR_DEPTH

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": ["ü"]}}}
IS_SCHEMA = specs.json_schema(SCHEMA)


def response_schema(**inner: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA} | inner}


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        ({}, None),
        ({"response_format": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, specs.json_object()),
        ({"response_format": response_schema(strict=True, description="d")}, IS_SCHEMA),
        ({"response_format": response_schema(strict=False)}, IS_SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, IS_SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, IS_SCHEMA),
        ({"structured_outputs": {"json_object": True}}, specs.json_object()),
        ({"structured_outputs": {"regex": "a+"}}, specs.regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, specs.choice(["a", "b"])),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, specs.grammar('start: "a"')),
        ({"guided_json": SCHEMA}, IS_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, IS_SCHEMA),
        ({"guided_json": True}, specs.json_schema(True)),
        ({"guided_regex": "a+"}, specs.regex("a+")),
        ({"guided_choice": ["a"]}, specs.choice(["a"])),
        ({"guided_grammar": 'root ::= "a"'}, specs.grammar('root ::= "a"')),
        ({"guided_regex": "a", "response_format": {"type": "text"}}, specs.regex("a")),
        ({"grammar": IS_SCHEMA}, IS_SCHEMA),
    ],
)
def test_accepted(given: dict[str, Any], spec: GrammarSpec | None) -> None:
    params = validate_params(**given)
    assert params.grammar == spec
    assert check_params(params) == params


def test_the_order_of_properties_is_kept() -> None:
    assert IS_SCHEMA.text == json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":"))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


REGEX = {"regex": "a"}


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {}}, "response_format.type", "'text', 'json_object' or"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "'schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "object"),
        (
            {"response_format": response_schema(schema=None)},
            "response_format.json_schema.schema",
            "is missing",
        ),
        (
            {"response_format": response_schema(name="x" * 65)},
            "response_format.json_schema.name",
            "at most 64",
        ),
        (
            {"response_format": response_schema(strict="yes")},
            "response_format.json_schema.strict",
            "true or false",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": REGEX | {"choice": ["a"]}}, "structured_outputs", "choice, regex"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "'regexp'"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": [1]}, "guided_json", "must be a JSON Schema"),
        ({"guided_json": {"const": float("nan")}}, "guided_json", "is not JSON"),
        ({"guided_json": {"const": "\ud800"}}, "guided_json", "surrogate"),
        ({"guided_json": nested(MAX_GRAMMAR_DEPTH + 1)}, "guided_json", "more than 100 deep"),
        ({"guided_json": {"x": "a" * MAX_GRAMMAR_CHARS}}, "guided_json", "at most 262144"),
        ({"guided_regex": "(" * 101}, "guided_regex", "more than 100 deep"),
        ({"guided_regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "guided_regex", "at most 262144"),
        ({"guided_choice": []}, "guided_choice", "is empty"),
        ({"guided_choice": [1]}, "guided_choice", "must be a string"),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "guided_choice", "at most 10000"),
        ({"guided_grammar": ""}, "guided_grammar", "at least 1"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            "and response_format both ask",
        ),
        ({"guided_regex": "a", "structured_outputs": REGEX}, "guided_regex", "give one"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "contradicts"),
        ({"grammar": "a"}, "grammar", "must be a GrammarSpec"),
        ({"grammar": GrammarSpec(GrammarKind.CHOICE, "[1]")}, "grammar", "must be a string"),
        ({"grammar": GrammarSpec(GrammarKind.CHOICE, "[")}, "grammar", "not a JSON list"),
        ({"grammar": GrammarSpec("xml", "a")}, "grammar", "must be a GrammarSpec"),
    ],
)
def test_refused(given: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        validate_params(**given)
    assert caught.value.param == param
    assert words in caught.value.message
    assert len(caught.value.message) < 250


def test_depth_up_to_the_limit_is_fine() -> None:
    assert validate_params(guided_json=nested(MAX_GRAMMAR_DEPTH)).grammar is not None
    assert validate_params(guided_regex="(" * 100 + "a" + ")" * 100).grammar is not None


def test_rows_cannot_name_the_field() -> None:
    from batchwright.job.rows import COMPLETIONS, InputRow
    from batchwright.job.validate import parse_row

    row = InputRow(1, "r", COMPLETIONS, {"prompt": "x", "grammar": "a"})
    with pytest.raises(RequestError, match="unknown parameter 'grammar'"):
        parse_row(row)
    assert parse_row(
        InputRow(1, "r", COMPLETIONS, {"prompt": "x", "guided_regex": "a"})
    ).params == (SamplingParams(grammar=specs.regex("a")))
