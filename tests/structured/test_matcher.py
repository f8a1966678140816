"""What a matcher allows next: ends, stop tokens, min_tokens, dead ends."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchwright.request import SamplingParams
from batchwright.structured import spec as specs
from batchwright.structured.compile import GrammarCompiler
from batchwright.structured.matcher import Matcher
from batchwright.text.tokenizer import Tokenizer
from tests.structured.walk import allowed

END = 2


def open_matcher(compiler: GrammarCompiler, pattern: str, **params: Any) -> Matcher:
    return compiler.compile(specs.regex(pattern)).matcher(SamplingParams(**params))


def take(matcher: Matcher, tokenizer: Tokenizer, text: str) -> None:
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        assert token_id in allowed(matcher)
        matcher.consume(token_id)


def test_the_end_is_allowed_where_the_grammar_is_satisfied(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = open_matcher(compiler, "a{1,2}")
    assert END not in allowed(matcher)
    take(matcher, tokenizer, "a")
    assert END in allowed(matcher) and not matcher.is_complete
    take(matcher, tokenizer, "a")
    assert allowed(matcher).tolist() == [END] and matcher.is_complete
    matcher.consume(END)
    assert matcher.error is None


def test_matchers_do_not_disturb_each_other(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    first, second = (open_matcher(compiler, "ab*c") for _ in range(2))
    before = allowed(second).tolist()
    take(first, tokenizer, "a")
    assert allowed(second).tolist() == before != allowed(first).tolist()


def test_stop_tokens_are_end_tokens(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    (letter,) = tokenizer.encode("b", add_special_tokens=False)
    (comma,) = tokenizer.encode(",", add_special_tokens=False)
    matcher = open_matcher(compiler, "a[abc]*", stop_token_ids=(letter, comma, END))
    take(matcher, tokenizer, "a")
    ids = set(allowed(matcher).tolist())
    assert {letter, comma, END} <= ids
    matcher.consume(letter)  # it ends the output and is no part of it
    assert matcher.error is None

    matcher = open_matcher(compiler, "[abc],c", stop_token_ids=(comma,))
    take(matcher, tokenizer, "a")
    assert comma not in allowed(matcher)  # the grammar wants it, but not as an end


def test_min_tokens_put_off_the_end_while_something_else_is_possible(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = open_matcher(compiler, "a{1,3}", min_tokens=3)
    take(matcher, tokenizer, "a")
    assert END not in allowed(matcher)
    take(matcher, tokenizer, "a")
    assert END not in allowed(matcher)
    take(matcher, tokenizer, "a")
    assert allowed(matcher).tolist() == [END]

    matcher = open_matcher(compiler, "aa?", min_tokens=100)
    take(matcher, tokenizer, "a")
    take(matcher, tokenizer, "a")
    assert allowed(matcher).tolist() == [END]  # nothing else is left


def test_a_dead_end_says_why(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    (token_id,) = tokenizer.encode("b", add_special_tokens=False)
    matcher = open_matcher(compiler, "ab", stop_token_ids=(token_id, *range(3, 200)))
    for word in ("a", "ab"):
        ids = tokenizer.encode(word, add_special_tokens=False)
        matcher._stop_ids |= set(ids)
    assert not len(allowed(matcher))
    assert matcher.error is not None and "stop_token_ids forbid" in matcher.error.message


def test_a_grammar_that_outgrows_its_limits_says_why(compiler: GrammarCompiler) -> None:
    matcher = open_matcher(compiler, r"((((a{1,100}){1,100}){1,100}){1,100}){1,100}")
    rng = np.random.default_rng(0)
    for _ in range(100):
        ids = allowed(matcher)
        if not len(ids):
            break
        matcher.consume(int(rng.choice(ids)))
    assert matcher.error is not None
    assert matcher.error.code == "grammar_dead_end"
    assert "cannot go on" in matcher.error.message


def test_text_keeps_a_leading_space(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = open_matcher(compiler, " yes")
    assert matcher.text(tokenizer.encode(" yes é", add_special_tokens=False)) == " yes é"
