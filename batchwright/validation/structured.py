"""The parameters that ask for structured output, checked and brought into one GrammarSpec.

`response_format` is OpenAI's, `structured_outputs` and the older `guided_*` are vLLM's. A row uses
one of them. Sizes and depths are bounded here; whether a grammar compiles, and how long that takes,
is found out in the worker process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from batchwright.structured import spec as specs
from batchwright.structured.spec import GrammarKind, GrammarSpec
from batchwright.validation import checks

MAX_GRAMMAR_CHARS = 262_144
MAX_GRAMMAR_DEPTH = 100
MAX_CHOICES = 10_000
MAX_SCHEMA_NAME_CHARS = 64

GRAMMAR_NAMES = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


def take_grammar(fields: dict[str, Any]) -> GrammarSpec | None:
    """Take the parameters of GRAMMAR_NAMES, and "grammar" (a GrammarSpec), out of fields.

    Raises:
        RequestError: one of them is malformed or too large, or two ask for a grammar.
    """
    found: dict[str, GrammarSpec] = {}
    for name in ("grammar", *GRAMMAR_NAMES):
        value = fields.pop(name, None)
        spec = None if value is None else _READERS[name](name, value)
        if spec is not None:
            found[name] = spec if name == "grammar" else replace(spec, param=name)
    if len(found) > 1:
        first, second = list(found)[:2]
        checks.fail(second, f"and {first} both ask for a form of the output; give one")
    return next(iter(found.values()), None)


def _response_format(param: str, value: Any) -> GrammarSpec | None:
    kind = _object(param, value).get("type")
    if kind == "text":
        _only_keys(param, value, {"type"})
        return None
    if kind == "json_object":
        _only_keys(param, value, {"type"})
        return specs.json_object()
    if kind != "json_schema":
        checks.fail(
            f"{param}.type",
            f"is {checks.shown(kind)}; it must be 'text', 'json_object' or 'json_schema'",
        )
    _only_keys(param, value, {"type", "json_schema"})
    inner = f"{param}.json_schema"
    outer = _object(inner, value.get("json_schema"))
    _only_keys(inner, outer, {"name", "description", "schema", "strict"})
    for key in ("name", "description"):
        if outer.get(key) is not None:
            limit = MAX_SCHEMA_NAME_CHARS if key == "name" else None
            checks.text(f"{inner}.{key}", outer[key], max_chars=limit)
    if outer.get("strict") is not None:
        checks.boolean(f"{inner}.strict", outer["strict"])  # we enforce schemas either way
    if outer.get("schema") is None:
        checks.fail(f"{inner}.schema", "is missing", code="missing_required_parameter")
    return _schema(f"{inner}.schema", outer["schema"])


def _structured_outputs(param: str, value: Any) -> GrammarSpec | None:
    given = {key: item for key, item in _object(param, value).items() if item is not None}
    _only_keys(param, given, _FORMS.keys() | {"json_object"})
    if "json_object" in given and not checks.boolean(f"{param}.json_object", given["json_object"]):
        del given["json_object"]
    if len(given) != 1:
        names = ", ".join(sorted(given)) or "nothing"
        checks.fail(param, f"has {names}; it needs exactly one of json, regex, choice, grammar")
    ((key, item),) = given.items()
    return specs.json_object() if key == "json_object" else _FORMS[key](f"{param}.{key}", item)


def _schema(param: str, value: Any) -> GrammarSpec:
    """A JSON Schema as an object, true or false, or JSON text of one."""
    if isinstance(value, str):
        _bounded(param, value)
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            checks.fail(param, "is not valid JSON")
    if not isinstance(value, dict | bool):
        checks.fail(param, f"must be a JSON Schema (an object), not {checks.shown(value)}")
    if isinstance(value, dict):
        _check_depth(param, value)
    try:
        spec = specs.json_schema(value)
    except (TypeError, ValueError, RecursionError) as error:
        checks.fail(param, f"is not JSON: {error}")
    _bounded(param, spec.text)
    return spec


def _regex(param: str, value: Any) -> GrammarSpec:
    pattern = _bounded(param, value)
    _check_brackets(param, pattern)
    return specs.regex(pattern)


def _choice(param: str, value: Any) -> GrammarSpec:
    texts = [checks.text(param, text) for text in checks.items(param, value, MAX_CHOICES)]
    if not texts:
        checks.fail(param, "is empty; it needs at least one text")
    spec = specs.choice(texts)
    _bounded(param, spec.text)
    return spec


def _grammar(param: str, value: Any) -> GrammarSpec:
    text = _bounded(param, value)
    _check_brackets(param, text)
    return specs.grammar(text)


def _spec(param: str, value: Any) -> GrammarSpec:
    """A GrammarSpec that a Python caller built, checked as the same text from a row would be."""
    if not isinstance(value, GrammarSpec) or value.kind not in list(GrammarKind):
        checks.fail(param, f"must be a GrammarSpec, not {checks.shown(value)}")
    if value.kind == GrammarKind.JSON_OBJECT:
        return specs.json_object()
    if value.kind != GrammarKind.CHOICE:
        reader = {GrammarKind.JSON_SCHEMA: _schema, GrammarKind.REGEX: _regex}
        return reader.get(value.kind, _grammar)(param, value.text)
    try:
        texts = msgspec.json.decode(_bounded(param, value.text))
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        checks.fail(param, "has a choice that is not a JSON list of texts")
    return _choice(param, texts)


_FORMS: dict[str, Callable[[str, Any], GrammarSpec]] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}
_READERS: dict[str, Callable[[str, Any], GrammarSpec | None]] = {
    "grammar": _spec,
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    **{f"guided_{key}": reader for key, reader in _FORMS.items()},
}


def _object(param: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        checks.fail(param, f"must be an object, not {checks.shown(value)}")
    return value


def _only_keys(param: str, value: dict[str, Any], known: set[str]) -> None:
    for key in value:
        if key not in known:
            checks.fail(param, f"has {checks.shown(key)}; it can have {', '.join(sorted(known))}")


def _bounded(param: str, value: Any) -> str:
    return checks.text(param, value, min_chars=1, max_chars=MAX_GRAMMAR_CHARS)


def _check_depth(param: str, value: Any) -> None:
    """Containers inside containers, counted without recursion."""
    level: list[Any] = [value]
    depth = -1
    while level:
        depth += 1
        if depth > MAX_GRAMMAR_DEPTH:
            checks.fail(param, f"is nested more than {MAX_GRAMMAR_DEPTH} deep")
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for children in inner for child in children if _holds_more(child)]


def _holds_more(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)


def _check_brackets(param: str, text: str) -> None:
    """Open brackets at once; those in quotes and classes count too, which is simple and enough."""
    depth = 0
    for char in text:
        if char in "([{":
            depth += 1
            if depth > MAX_GRAMMAR_DEPTH:
                checks.fail(param, f"is nested more than {MAX_GRAMMAR_DEPTH} deep")
        elif char in ")]}":
            depth = max(depth - 1, 0)
