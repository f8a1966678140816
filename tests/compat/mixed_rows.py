"""An OpenAI batch file with rows of every endpoint and of many kinds; every tenth is bad."""

from __future__ import annotations

from typing import Any

from batchwright.job.rows import CHAT, COMPLETIONS, EMBEDDINGS, SCORE

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
FORM = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA}}
FUNCTION = {"name": "count", "description": "Counts.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}

ORDER = (CHAT, COMPLETIONS, CHAT, EMBEDDINGS, CHAT, COMPLETIONS, CHAT, SCORE)
CHATS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"n": 2, "seed": 11},
    {"logprobs": True, "top_logprobs": 2},
    {"response_format": FORM},
    {"stop": ["a", "e"], "temperature": 0.8, "top_p": 0.9},
    {"tools": [TOOL], "temperature": 0},
    {"tools": [TOOL], "tool_choice": "none", "frequency_penalty": 0.5, "seed": 3},
)
COMPLETED: tuple[dict[str, Any], ...] = (
    {"top_p": 0.9, "echo": True},
    {"prompt": ["One,", "Two,"], "temperature": 0},
    {"logprobs": 2, "seed": 5},
    {"n": 2, "stop": ","},
    {"prompt": [[504, 216], [504]], "temperature": 0},
    {"structured_outputs": {"choice": ["yes", "no"]}},
)
EMBEDDED: tuple[dict[str, Any], ...] = (
    {},
    {"input": ["One.", "Two.", "Three."]},
    {"encoding_format": "base64"},
)
BAD: tuple[dict[str, Any], ...] = (
    {"temperature": "hot"},
    {"no_such_parameter": 1},
    {"model": 3},
    {"messages": [], "prompt": 3, "input": {}, "context": None},
)


def mixed_rows(num_rows: int) -> list[dict[str, Any]]:
    """Rows in an order in which any eight have every endpoint."""
    return [
        {"custom_id": f"row {i}", "method": "POST", "url": ORDER[i % 8], "body": _body(i)}
        for i in range(num_rows)
    ]


def _body(i: int) -> dict[str, Any]:
    url, turn = ORDER[i % 8], i // 8
    body: dict[str, Any]
    if url == CHAT:
        messages = [{"role": "user", "content": f"Say a word about {i % 90}."}]
        body = {"messages": messages, "max_tokens": 8, **CHATS[i // 2 % len(CHATS)]}
    elif url == COMPLETIONS:
        body = {"prompt": f"{i} and {i + 1}", "max_tokens": 6, **COMPLETED[i // 4 % len(COMPLETED)]}
    elif url == EMBEDDINGS:
        body = {"input": f"The number {i}.", **EMBEDDED[turn % len(EMBEDDED)]}
    else:
        body = {"context": f"{i} is", "continuation": " a number"}
    return body | (BAD[turn % len(BAD)] if i % 10 == 9 else {})
