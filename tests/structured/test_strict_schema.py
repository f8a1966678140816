"""Texts that llguidance alone would let through although they do not satisfy the schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from batchwright.errors import RequestError
from batchwright.structured import spec as specs
from batchwright.structured.compile import GrammarCompiler
from batchwright.structured.strict_schema import strict_schema

INTEGER = {"type": "integer"}


def accepts(compiler: GrammarCompiler, schema: dict[str, Any], text: str) -> bool:
    return compiler.compile(specs.json_schema(schema)).accepts(text)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object", "properties": {"a": INTEGER}}, r'{"a": 1, "\u0061": "x"}'),
        ({"type": "object", "properties": {"é": INTEGER}}, r'{"\u00e9": "x"}'),
        ({"type": "object", "patternProperties": {"^x": INTEGER}}, r'{"\u0078a": "s"}'),
        ({"type": "object", "x-guidance": {"key_separator": "="}}, '{"a"=1}'),
        ({"type": "array", "items": INTEGER, "x-guidance": {"item_separator": ";"}}, "[1;2]"),
        ({"type": "string", "format": "date"}, '"2023-02-29"'),
        ({"type": "string", "format": "date"}, '"1900-02-29"'),
        ({"type": "string", "format": "date-time"}, '"2023-02-29T10:00:00Z"'),
        ({"properties": {"enum": {"format": "date"}}}, '{"enum": "2023-02-29"}'),
        ({"format": "date", "allOf": [{"pattern": "^20"}]}, '"2023-02-29"'),
    ],
)
def test_what_does_not_validate_is_not_accepted(
    schema: dict[str, Any], text: str, compiler: GrammarCompiler
) -> None:
    assert not accepts(compiler, schema, text)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object", "properties": {"a\n": INTEGER}}, r'{"a\n": 1, "é😀": "\"\\"}'),
        ({"type": "array", "items": INTEGER, "x-guidance": {"item_separator": ";"}}, "[1 , 2]"),
        ({"type": "string", "format": "date"}, '"2024-02-29"'),
        ({"type": "string", "format": "date"}, '"2000-02-29"'),
        ({"type": "string", "format": "date"}, '"2023-10-31"'),
        ({"type": ["string", "null"], "format": "date-time"}, '"2023-02-28T10:00:00Z"'),
        ({"const": {"format": "date"}}, '{"format": "date"}'),
        ({"type": "object", "minProperties": 1}, '{"a": 1}'),
        ({"required": ["a"], "properties": {"a": {}}, "minProperties": 2}, '{"a": 1, "b": 2}'),
        ({"type": "integer", "maximum": 2**60}, "1152921504606846976"),
    ],
)
def test_what_validates_still_is(
    schema: dict[str, Any], text: str, compiler: GrammarCompiler
) -> None:
    jsonschema.validate(json.loads(text), schema)
    assert accepts(compiler, schema, text)


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "object", "minProperties": 2}, "minProperties 2"),
        ({"items": {"patternProperties": {"x": {}}, "minProperties": 3}}, "minProperties 3"),
        ({"type": "integer", "minimum": 2**53 + 1}, "minimum has more digits"),
        ({"type": "number", "multipleOf": 10**400}, "multipleOf has more digits"),
    ],
)
def test_bounds_that_would_not_be_kept_are_refused(
    schema: dict[str, Any], problem: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(RequestError, match=problem):
        compiler.compile(specs.json_schema(schema))


def test_the_given_schema_is_not_changed() -> None:
    schema = {"properties": {"d": {"format": "date", "allOf": [{"minLength": 1}]}}}
    before = json.dumps(schema)
    assert strict_schema(schema) != schema
    assert json.dumps(schema) == before
