"""Messages and tools of one row, checked and brought into the plain form that templates see.

What transformers does before rendering is done here too: keys whose value is None are dropped, and
a message's reasoning is found under every name that templates read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from batchwright.errors import RequestError

Message = dict[str, Any]

MAX_DEPTH = 64
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


def prepare_messages(
    messages: Sequence[Mapping[str, Any]], *, keep_parts: Callable[[], bool]
) -> list[Message]:
    """Copy messages into plain dicts, ready for a template.

    Content given as a list of text parts becomes one string, joined without a separator, unless
    `keep_parts()` says that the template handles lists (asked only when there is a list).

    Raises:
        RequestError: not a list of messages with roles, a part that is not text, or values that
            JSON does not have.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages is {type(messages).__name__}, must be a list of messages", param="messages"
        )
    if not messages:
        raise RequestError("messages is empty; give at least one message", param="messages")
    return [_prepare(message, f"messages[{i}]", keep_parts) for i, message in enumerate(messages)]


def prepare_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Copy tool schemas into plain dicts.

    Raises:
        RequestError: not a list of JSON objects.
    """
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(
            f"tools is {type(tools).__name__}, must be a list of objects", param="tools"
        )
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise RequestError(
                f"tools[{i}] is {type(tool).__name__}, must be a JSON object", param="tools"
            )
    return [plain_json(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def plain_json(value: Any, where: str, depth: int = 0) -> Any:
    """Copy a JSON-like value out of exact built-in types, so that no method reaches a template.

    Raises:
        RequestError: a value of another type, a key that is not text, or nesting over MAX_DEPTH.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth >= MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {MAX_DEPTH} deep", param=_root(where))
    if isinstance(value, Mapping):
        copy = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise RequestError(f"{where} has key {key!r}, must be text", param=_root(where))
            copy[str.__str__(key)] = plain_json(item, where, depth + 1)
        return copy
    if isinstance(value, list | tuple):
        return [plain_json(item, where, depth + 1) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):  # a subclass, such as an enum
            return str.__str__(value) if kind is str else kind(value)
    raise RequestError(
        f"{where} holds a {type(value).__name__}; use JSON values only", param=_root(where)
    )


def _prepare(message: Any, where: str, keep_parts: Callable[[], bool]) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"{where} is {type(message).__name__}, must be an object with role and content",
            param="messages",
        )
    plain = plain_json({k: v for k, v in message.items() if v is not None}, where)
    if not isinstance(plain.get("role"), str):
        raise RequestError(f'{where} has no "role"; give it as text', param="messages")
    content = plain.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        if not content or not keep_parts():
            plain["content"] = "".join(texts)
    elif content is not None and not isinstance(content, str):
        raise RequestError(
            f"{where}.content is {type(content).__name__}, must be text or a list of text parts",
            param="messages",
        )
    return _with_reasoning(plain)


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise RequestError(
            f'{where} is of type {kind!r}; only {{"type": "text", "text": ...}} is supported',
            param="messages",
        )
    return text


def _with_reasoning(message: Message) -> Message:
    names = [name for name in _REASONING_NAMES if message.get(name) is not None]
    if not names:
        return message
    reasoning = message[names[0]]
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _root(where: str) -> str:
    return where.split("[")[0].split(".")[0]
