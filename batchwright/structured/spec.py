"""GrammarSpec: what form an output must have, as plain data. Nothing is compiled here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class GrammarKind(StrEnum):
    """How a GrammarSpec's text is to be read."""

    JSON_OBJECT = "json_object"  # no text: any JSON object
    JSON_SCHEMA = "json_schema"  # a JSON Schema, as JSON text
    REGEX = "regex"  # the whole output matches this regular expression
    CHOICE = "choice"  # a JSON list of texts, one of which is the output
    GRAMMAR = "grammar"  # a context-free grammar in Lark's or GBNF's notation


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """The form of an output. Equal specs compile to the same grammar.

    Built by the functions below, or from a row's parameters by `validation/structured.py`, which
    also checks it.
    """

    kind: GrammarKind
    text: str = ""
    param: str = field(default="structured_outputs", compare=False)  # of the row, for errors


def json_object() -> GrammarSpec:
    """Any JSON object."""
    return GrammarSpec(GrammarKind.JSON_OBJECT)


def json_schema(schema: dict[str, Any] | bool) -> GrammarSpec:
    """JSON that validates against a schema; properties come in the schema's order.

    Raises:
        ValueError, TypeError: the schema is not JSON.
        RecursionError: it is nested too deep for JSON text.
    """
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return GrammarSpec(GrammarKind.JSON_SCHEMA, text)


def regex(pattern: str) -> GrammarSpec:
    """Text that matches a regular expression (Rust's syntax) from its start to its end."""
    return GrammarSpec(GrammarKind.REGEX, pattern)


def choice(texts: Sequence[str]) -> GrammarSpec:
    """One of some texts."""
    return GrammarSpec(GrammarKind.CHOICE, json.dumps(list(texts), ensure_ascii=False))


def grammar(text: str) -> GrammarSpec:
    """Text of a context-free language: Lark's notation, or GBNF's, which is known by its `::=`."""
    return GrammarSpec(GrammarKind.GRAMMAR, text)
