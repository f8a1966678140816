"""Answers of models: reasoning and tool calls split out of any text."""

from __future__ import annotations

import json

from batchwright.job.formats.reasoning import split_reasoning
from batchwright.job.formats.tool_calls import split_tool_calls
from batchwright.text.markup import TOOL_MARKS

FORMS = tuple(TOOL_MARKS)
NAMES = frozenset({"f", "get_time"})


def run(data: bytes) -> None:
    """The first byte chooses the form, and whether the prompt began the reasoning."""
    choice, text = (data[0] if data else 0), data[1:].decode("utf-8", "replace")
    form, is_open = FORMS[choice % len(FORMS)], choice >= 128
    reasoning, content = split_reasoning(text, is_open)
    assert reasoning is None or reasoning in text
    assert content is None or content in text
    assert (reasoning, content) != (None, None)
    rest, calls = split_tool_calls(content or "", form, NAMES)
    assert calls or rest == (content or "")
    for call in calls:
        assert call.name in NAMES
        assert isinstance(json.loads(call.arguments), dict)
        assert call.arguments in text or call.arguments == "{}"
    assert len(rest) + sum(len(call.arguments) for call in calls) <= len(text) + 2 * len(calls)


def seeds() -> list[bytes]:
    """Calls in each form, between text and after reasoning."""
    call = '<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
    return [
        b"\x00<think>\nhm\n</think>\n\nI ask." + call.encode(),
        b"\x00" + 2 * b'<tool_call>{"name": "get_time", "parameters": {}}</tool_call>\n',
        b"\x80so\n</think>\n<tool_call>{</tool_call>",
        b'\x01[TOOL_CALLS][{"name": "f", "arguments": {"a": "\xc3\xa9"}}, {"name": "f"}]',
        b'\x01[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}[TOOL_CALLS]get_time{"b": null}',
        b'\x02<|python_tag|>{"name": "f", "parameters": {"a": "\\u00e9"}}; {"name": "f"}',
        b'\x02{"name": "get_time", "parameters": {}}',
    ]


WORDS = (*("<think>", "</think>", "name", "arguments", "parameters", "\\ud800", "1e999", "NaN"),
         *(mark for marks in TOOL_MARKS.values() for mark in marks))  # fmt: skip
