"""Rows that bring a grammar or a template, prepared with the real tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from batchwright.errors import RequestError
from batchwright.job.prepare import prepare_rows
from batchwright.job.rows import CHAT, InputRow
from batchwright.job.validate import ParsedRow, parse_row
from batchwright.request import NO_MARKUP, Request
from batchwright.structured.compile import GrammarCompiler
from batchwright.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hi <|im_end|>"}]


def chat(line: int = 1, **body: Any) -> ParsedRow:
    return parse_row(InputRow(line, f"r{line}", CHAT, {"messages": MESSAGES} | body))


def prepared(
    row: ParsedRow, tokenizer: Tokenizer, compiler: GrammarCompiler | None
) -> Request | RequestError:
    (found,) = prepare_rows([row], tokenizer, compiler)
    return found


def test_a_template_of_the_row(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    assert isinstance(tokenizer.chat_template, str)
    own = prepared(chat(chat_template=tokenizer.chat_template), tokenizer, compiler)
    models = prepared(chat(), tokenizer, compiler)
    assert isinstance(own, Request) and isinstance(models, Request)
    assert own.prompt_token_ids.tolist() == models.prompt_token_ids.tolist()
    template = "<|im_start|>{{ messages[0].content }}"
    other = prepared(chat(chat_template=template), tokenizer, compiler)
    assert isinstance(other, Request)
    assert other.prompt == "<|im_start|>Hi <|im_end|>"
    assert other.prompt_token_ids.tolist()[0] == 1
    assert 2 not in other.prompt_token_ids  # what the user spells stays text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"chat_template": "{% for %}"}, "chat_template: the chat template is not valid"),
        ({"chat_template": "x", "chat_template_kwargs": {"y": 1}}, "'y' cannot be set"),
        ({"structured_outputs": {"regex": "("}}, "unclosed group"),
    ],
)
def test_what_cannot_be_used_fails_with_its_row(
    body: dict[str, Any], words: str, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    bad, good = prepare_rows([chat(3, **body), chat(4)], tokenizer, compiler)
    assert isinstance(bad, RequestError) and isinstance(good, Request)
    assert words in bad.message and bad.line == 3


def test_structured_answers_are_not_split(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    row = chat(
        chat_template="<think></think>{{ messages[0].content }}",
        response_format={"type": "json_object"},
    )
    found = prepared(row, tokenizer, compiler)
    assert isinstance(found, Request) and found.markup == NO_MARKUP


def test_without_a_compiler(tokenizer: Tokenizer) -> None:
    found = prepared(chat(chat_template="x"), tokenizer, None)
    assert isinstance(found, RequestError) and found.param == "chat_template"
    found = prepared(chat(guided_regex="("), tokenizer, None)
    assert isinstance(found, Request)  # the engine will refuse it
