"""What a template says about answers, and marks that are special tokens staying in the text."""

import pytest

from batchwright.request import Markup, SamplingParams
from batchwright.text.detokenizer import StopStringChecker
from batchwright.text.markup import markup_of
from batchwright.text.tokenizer import Tokenizer

SPECIAL = {"<|im_end|>": 2, "<think>": 7, "</think>": 8, "[TOOL_CALLS]": 9, "<|python_tag|>": 10}


@pytest.mark.parametrize(
    ("source", "markup"),
    [
        ("{{ messages }}", Markup()),
        ("{% if '</think>' in content %}", Markup(True, None, frozenset({7, 8}))),
        ("return <tool_call>\n{...}", Markup(False, "hermes")),
        ("<tool_call> <think></think>", Markup(True, "hermes", frozenset({7, 8}))),
        ("{{ '[TOOL_CALLS]' }}", Markup(False, "mistral", frozenset({9}))),
        ("{{ '<|python_tag|>' }}", Markup(False, "llama", frozenset({10}))),
        (
            'Respond in the format {"name": function name, "parameters": dictionary}.',
            Markup(False, "llama", frozenset({10})),
        ),
    ],
)
def test_markup_of_templates(source: str, markup: Markup) -> None:
    assert markup_of(source, SPECIAL, with_tools=True) == markup
    assert markup_of(source, SPECIAL, with_tools=False).tool_calls is None


def test_marks_of_tools_are_left_out_without_tools() -> None:
    assert markup_of("[TOOL_CALLS]", SPECIAL, with_tools=False) == Markup()


def test_kept_special_tokens_stay_in_text_and_streams(smollm: Tokenizer) -> None:
    kept, dropped = (smollm.backend.token_to_id(s) for s in ("<repo_name>", "<|im_start|>"))
    assert {kept, dropped} <= smollm.special_token_ids
    ids = [dropped, *smollm.encode("one"), kept, *smollm.encode(" two END"), dropped]
    keep = frozenset({kept})
    assert smollm.decode(ids) == "one two END"
    assert smollm.decode(ids, keep=keep) == "one<repo_name> two END"
    assert smollm.decode(ids, skip_special_tokens=False, keep=keep) == smollm.decode(
        ids, skip_special_tokens=False
    )
    checker = StopStringChecker(smollm, SamplingParams(stop=(" END",)), keep=keep)
    match = checker.append(ids)
    assert match is not None
    assert match.text == "one<repo_name> two"


def test_the_markup_follows_the_template_in_use(smollm: Tokenizer) -> None:
    before = smollm.chat_template
    try:
        smollm.chat_template = {"default": "<think></think>", "tool_use": "<tool_call>"}
        assert smollm.markup(with_tools=False) == Markup(True)
        assert smollm.markup(with_tools=True) == Markup(False, "hermes")
    finally:
        smollm.chat_template = before
