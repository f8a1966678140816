"""Grammars of every kind: what they let through, and what cannot be compiled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from batchwright.errors import RequestError
from batchwright.request import SamplingParams
from batchwright.structured import compile as compile_module
from batchwright.structured import spec as specs
from batchwright.structured.compile import GrammarCompiler
from batchwright.structured.spec import GrammarSpec
from batchwright.text.backend import TokenizerParts
from batchwright.text.tokenizer import Tokenizer, load_tokenizer
from batchwright.validation.params import validate_params
from tests.structured.conftest import VOCAB_SIZE
from tests.structured.walk import allowed, random_output

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 3, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["tea", "ü", 1, None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"enum": ["a", 1, None, {"x": [1]}]},
    {"anyOf": [{"type": "boolean"}, {"const": "é\n"}]},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,3}$"},
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3},
    {"type": "string", "format": "date"},
    {
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
        "$ref": "#/$defs/node",
    },
]


PATTERNS = [
    r"[0-9]x\d{4}-\D",
    " ?(yes|no)!*",
    "[äöü日本]{1,5}🚉",
    "a|",
    "a/b\nc{2}\\/|d#",
    "(?i)Yes ",
]


def outputs(compiler: GrammarCompiler, spec: GrammarSpec, num: int = 12) -> list[str]:
    """Texts of random outputs that came to their end."""
    grammar, rng = compiler.compile(spec), np.random.default_rng(0)
    texts = []
    for _ in range(num):
        matcher = grammar.matcher(SamplingParams())
        tokens, is_whole = random_output(matcher, {2}, rng)
        if is_whole:
            texts.append(matcher.text(tokens))
            assert grammar.accepts(texts[-1])
    assert texts
    return texts


@pytest.mark.parametrize("schema", SCHEMAS)
def test_outputs_validate(schema: dict[str, Any], compiler: GrammarCompiler) -> None:
    for text in outputs(compiler, specs.json_schema(schema)):
        jsonschema.validate(
            json.loads(text), schema, format_checker=jsonschema.FormatChecker(["date"])
        )


def test_json_objects_parse(compiler: GrammarCompiler) -> None:
    assert all(isinstance(json.loads(t), dict) for t in outputs(compiler, specs.json_object()))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regexes_match_whole_outputs(pattern: str, compiler: GrammarCompiler) -> None:
    assert all(re.fullmatch(pattern, text) for text in outputs(compiler, specs.regex(pattern)))


def test_choices(compiler: GrammarCompiler) -> None:
    texts = ["yes", "no", "yes\nand", '"\\', "日本", "no"]
    assert set(outputs(compiler, specs.choice(texts), 60)) == set(texts)


@pytest.mark.parametrize(
    "text", ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'], ids=["lark", "gbnf"]
)
def test_grammars(text: str, compiler: GrammarCompiler) -> None:
    for output in outputs(compiler, specs.grammar(text)):
        depth = output.count("(")
        assert output == "(" * depth + "x" + ")" * depth


def test_whitespace_is_bounded(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(specs.json_object())
    assert grammar.accepts("{" + " " * 32 + '"a": 1}')
    assert not grammar.accepts("{" + " " * 33 + '"a": 1}')


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (specs.regex("(a"), "unclosed group"),
        (specs.regex("(?=a)a"), "look-around"),
        (specs.grammar("start: start"), "no text at all"),
        (specs.grammar('begin: "a"'), "start"),
        (specs.grammar('root ::= "a" | ('), "Expected"),
        (specs.json_schema(False), "no text at all"),
        (specs.json_schema({"not": {}, "x-guidance": {"lenient": True}}), "not"),
        (specs.json_schema({"type": "string", "format": "frobnicate"}), "frobnicate"),
        (specs.json_schema({"not": {}}), "not"),
        (specs.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (specs.json_schema({"$ref": "https://example.com/x"}), "does not fetch"),
        (specs.json_schema({"$ref": "#"}), "no text at all"),
    ],
)
def test_refused(spec: GrammarSpec, reason: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.compile(spec)
    assert reason in caught.value.message
    assert caught.value.code == "unsupported_grammar"
    assert len(caught.value.message) < 350


@pytest.mark.parametrize(
    "given",
    [
        {"structured_outputs": {"json": {"not": {}}}},
        {"guided_json": {"not": {}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
    ],
)
def test_a_refusal_names_the_rows_own_parameter(
    given: dict[str, Any], compiler: GrammarCompiler
) -> None:
    params = validate_params(**given)
    assert params.grammar is not None
    with pytest.raises(RequestError) as caught:
        compiler.compile(params.grammar)
    assert caught.value.param == next(iter(given))


def test_grammars_and_refusals_are_kept(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, cache_size=2)
    num_asked = 0
    ask = compiler.worker.compile

    def counted(*arguments: Any) -> str:
        nonlocal num_asked
        num_asked += 1
        return ask(*arguments)

    monkeypatch.setattr(compiler.worker, "compile", counted)
    good, bad = specs.regex("a"), specs.regex("(a")
    for _ in range(3):
        assert compiler.compile(good) is compiler.compile(specs.regex("a"))
        with pytest.raises(RequestError):
            compiler.compile(bad)
    assert num_asked == 2
    compiler.compile(specs.regex("b"))  # the least recently used gives way
    compiler.compile(good)
    assert num_asked == 4
    compiler.close()


def test_a_hugging_face_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    compiler = GrammarCompiler(load_tokenizer(tmp_path), VOCAB_SIZE + 5)  # padded logits
    assert set(outputs(compiler, specs.choice(["yes", "no"]))) == {"yes", "no"}
    matcher = compiler.compile(specs.regex("(?s).*")).matcher(SamplingParams())
    ids = allowed(matcher)
    assert ids.max() < VOCAB_SIZE and len(ids) > 40_000
    assert not set(ids.tolist()) & (tokenizer.special_token_ids - {2})
    compiler.close()


def without_end_tokens(tokenizer: Tokenizer) -> Tokenizer:
    parts = TokenizerParts(
        backend=tokenizer.backend,
        vocab_size=tokenizer.vocab_size,
        special_tokens={},
        end_token_ids=(),
    )
    return Tokenizer(parts)


def test_a_model_without_end_tokens(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(without_end_tokens(tokenizer), VOCAB_SIZE)
    matcher = compiler.compile(specs.regex("ab")).matcher(SamplingParams())
    tokens, is_whole = random_output(matcher, {VOCAB_SIZE}, np.random.default_rng(0))
    assert is_whole and matcher.text(tokens) == "ab"
    compiler.close()


def test_reasons_are_cut(compiler: GrammarCompiler) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.compile(specs.regex("(" + "a" * 5000))
    assert caught.value.message.endswith("...")
    assert len(caught.value.message) < compile_module.MAX_REASON_CHARS + 50
