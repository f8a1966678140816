"""From a GrammarSpec to a grammar of llguidance, and whether that grammar can be used.

It runs in the worker process first: both the conversion and the compilation of text that a row
brings may take any time and memory.
"""

from __future__ import annotations

import json

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from batchwright.structured.spec import GrammarKind, GrammarSpec
from batchwright.structured.strict_schema import strict_schema

JSON_WHITESPACE = r"[ \t\n\r]{1,32}"
"""Between the parts of JSON. Unbounded, it is where small models go on until max_tokens."""

# A schema may bring options of its own (x-guidance); these would let wrong output through.
_JSON_OPTIONS: llguidance._lib.JsonCompileOptions = {
    "whitespace_pattern": JSON_WHITESPACE,
    "lenient": False,
    "coerce_one_of": False,
    "item_separator": ",",
    "key_separator": ":",
    # Without \u: a further key spelled "\u0061" is "a", and would escape the schema of "a".
    "json_allowed_escapes": 'nrtbf\\"',
}

MAX_LEXER_STATES = 50_000
"""Per grammar; a state takes one or two kilobytes."""


def guidance_grammar(spec: GrammarSpec) -> str:
    """The spec as a grammar of llguidance; it may not compile yet.

    Raises:
        ValueError: the schema `false` or one with bounds that cannot be kept, or GBNF text that
            cannot be read.
    """
    text, matcher = spec.text, llguidance.LLMatcher
    if spec.kind in (GrammarKind.JSON_OBJECT, GrammarKind.JSON_SCHEMA):
        return matcher.grammar_from_json_schema(_schema_text(spec), overrides=_JSON_OPTIONS)
    if spec.kind is GrammarKind.REGEX:
        # \d means 0-9 in most people's minds and dialects; Rust's has all of Unicode's digits.
        return matcher.grammar_from_lark(f"start: /{llguidance.regex_to_lark(text, 'd')}/")
    if spec.kind is GrammarKind.CHOICE:
        texts = dict.fromkeys(json.loads(text))
        return matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))
    return matcher.grammar_from_lark(any_to_lark(text) if "::=" in text else text)


def _schema_text(spec: GrammarSpec) -> str:
    if spec.kind is GrammarKind.JSON_OBJECT:
        return '{"type":"object"}'
    if spec.text == "false":
        raise ValueError("no text at all satisfies it")
    schema = {} if spec.text == "true" else json.loads(spec.text)  # options need an object
    return json.dumps(strict_schema(schema), ensure_ascii=False)


def open_matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher at the start of an output, with its first mask computed.

    Raises:
        ValueError: why no output can be drawn with this grammar.
    """
    limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    mask = np.zeros(mask_words(tokenizer), np.uint32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    if matcher.is_error():
        if matcher.stop_reason() == "InternalError" and "NoExtension" in matcher.get_error():
            raise ValueError("no text at all satisfies it")
        raise ValueError(matcher.get_error())
    return matcher


def mask_words(tokenizer: llguidance.LLTokenizer) -> int:
    """Words of 32 bits in a mask over the vocabulary."""
    return -(-int(tokenizer.vocab_size) // 32)
