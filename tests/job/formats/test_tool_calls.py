"""Tool calls and reasoning split out of text: what counts, what stays, and in linear time."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.job.formats.reasoning import opens_reasoning, split_reasoning
from batchwright.job.formats.tool_calls import call_id, split_tool_calls
from batchwright.text.markup import TOOL_MARKS

NAMES = frozenset({"f", "get_weather"})
CALL = '{"name": "f", "arguments": {"x": 1.0, "y": [true, "é"]}}'
ARGUMENTS = '{"x": 1.0, "y": [true, "é"]}'  # spelled as the model spelled it


@pytest.mark.parametrize(
    ("form", "text", "rest", "calls"),
    [
        ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [("f", ARGUMENTS)]),
        (
            "hermes",
            f"Let me look.\n<tool_call>{CALL}</tool_call>\n"
            '<tool_call>{"name": "get_weather"}</tool_call>',
            "Let me look.",
            [("f", ARGUMENTS), ("get_weather", "{}")],
        ),
        ("hermes", f"<tool_call>{CALL}", "", [("f", ARGUMENTS)]),  # the end mark ended the output
        (
            "hermes",
            f'<tool_call>{CALL}</tool_call><tool_call>{{"name": "f", "argum',
            '<tool_call>{"name": "f", "argum',
            [("f", ARGUMENTS)],
        ),
        ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [("f", ARGUMENTS)] * 2),
        ("mistral", f"Hm.[TOOL_CALLS]f[ARGS]{ARGUMENTS}", "Hm.", [("f", ARGUMENTS)]),
        (
            "mistral",
            '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": 1}[TOOL_CALLS]get_weather{"b": {}}',
            "",
            [("f", '{"a": 1}'), ("get_weather", '{"b": {}}')],
        ),
        ("llama", '{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
        (
            "llama",
            '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}; '
            '{"name": "get_weather", "parameters": {"city": "Ulm; {}"}}\n',
            "",
            [("f", "{}"), ("get_weather", '{"city": "Ulm; {}"}')],
        ),
    ],
)
def test_calls(form: str, text: str, rest: str, calls: list[tuple[str, str]]) -> None:
    assert split_tool_calls(text, form, NAMES) == (rest, calls)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("form", TOOL_MARKS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "  The weather is fine.\n",
        '{"name": "f", "arguments": [1]}',
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        "<tool_call>not json</tool_call>",
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "unknown"}]',
        "[TOOL_CALLS]f[ARGS]",
        "[TOOL_CALLS]",
        "[TOOL_CALLS]g{}",
        "<|python_tag|>print(1)",
        '{"name": "f", "parameters": {}} and more',
        '[{"name": "f"}]',
    ],
)
def test_what_is_no_call_stays_as_it_is(form: str, text: str) -> None:
    assert split_tool_calls(text, form, NAMES) == (text, [])


@given(
    st.sampled_from(sorted(TOOL_MARKS)),
    st.lists(
        st.sampled_from(
            [*(mark for marks in TOOL_MARKS.values() for mark in marks), CALL, "f", "{", "}", "["]
        )
        | st.text(max_size=3)
    ).map("".join),
)
def test_any_text_gives_calls_that_are_sound(form: str, text: str) -> None:
    rest, calls = split_tool_calls(text, form, NAMES)
    assert calls or rest == text
    for call in calls:
        assert call.name in NAMES
        assert isinstance(json.loads(call.arguments), dict)


MEGABYTE = 1_000_000
SEEDS = [
    "<tool_call>",
    "</tool_call>",
    "<tool_call>{",
    '<tool_call>{"name": "f"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": ',
    "[TOOL_CALLS]",
    "[TOOL_CALLS][",
    "[TOOL_CALLS]f[ARGS]",
    "[TOOL_CALLS]f{}",
    "[ARGS]",
    "[",
    "{",
    '{"a":',
    '{"name": "f"};',
    '{"name": "f"}',
    "; ",
    "<|python_tag|>",
    "9",
    '"',
    "\\",
    "<think>",
    "</think>",
    "\n",
    "<",
]


@pytest.mark.parametrize("before", ["", '<tool_call>{"name": "f", "arguments": {"a": ', "{", "1"])
def test_a_megabyte_of_marks_takes_less_than_a_second(before: str) -> None:
    for seed in SEEDS:
        text = before + seed * (MEGABYTE // len(seed))
        for form in TOOL_MARKS:
            start_s = time.process_time()
            split_tool_calls(text, form, NAMES)
            split_reasoning(text, True)
            opens_reasoning(text)
            assert time.process_time() - start_s < 1.0, (form, seed)


def test_deep_json_is_no_call_and_does_not_raise() -> None:
    deep = '{"name": "f", "arguments": ' + '{"a":' * 200_000 + "1" + "}" * 200_001
    closed = ("<tool_call>" + deep, "[TOOL_CALLS][" + deep + "]", deep)
    for form, text in zip(TOOL_MARKS, closed):
        assert split_tool_calls(text, form, NAMES) == (text, [])


def test_ids_are_a_function_of_row_choice_and_place() -> None:
    ids = {
        call_id(row, choice, place, "hermes")
        for row in "ab"
        for choice in (0, 1)
        for place in (0, 1)
    }
    assert len(ids) == 8
    assert call_id("a", 0, 0, "hermes") == call_id("a", 0, 0, "hermes")
    assert call_id("a", 0, 0, "hermes").startswith("call_")
    short = call_id("a", 0, 0, "mistral")  # its templates refuse others
    assert len(short) == 9 and short.isalnum()


@pytest.mark.parametrize(
    ("text", "is_open", "split"),
    [
        ("Hello", False, (None, "Hello")),
        ("<think>\nhm\n</think>\n\nHello", False, ("hm", "Hello")),
        ("\n<think>hm</think>Hello</think>", False, ("hm", "Hello</think>")),
        ("hm\n</think>\n\nHello", True, ("hm", "Hello")),
        ("<think>hm</think>Hello", True, ("hm", "Hello")),
        ("hm, still", True, ("hm, still", None)),
        ("<think>\nhm", False, ("hm", None)),
        ("<think>\n\n</think>\n\nHello", False, ("", "Hello")),
        ("I say <think>x</think>", False, (None, "I say <think>x</think>")),
    ],
)
def test_reasoning(text: str, is_open: bool, split: tuple[str | None, str | None]) -> None:
    assert split_reasoning(text, is_open) == split


def test_whether_the_prompt_opens_the_reasoning() -> None:
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_reasoning("<|im_start|>assistant\n")
