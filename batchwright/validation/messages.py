"""Chat messages and tools, checked before a tokenizer is there.

One thing is changed, as other engines do: a tool call's arguments, which are JSON text in the API,
become the object that chat templates expect. All other keys of a message pass on as they are.
"""

from __future__ import annotations

from typing import Any

import msgspec

from batchwright.validation import checks

MAX_MESSAGES = 100_000
MAX_TOOLS = 1024
MAX_ROLE_CHARS = 64
MAX_TEMPLATE_KWARGS = 64


def check_messages(value: Any) -> list[dict[str, Any]]:
    """Messages of a chat row.

    Raises:
        RequestError: not a list of at least one message, a message without a role, content that
            is not text.
    """
    messages = checks.items("messages", value, MAX_MESSAGES)
    if not messages:
        checks.fail("messages", "is empty; it needs at least one message")
    return [_check_message(f"messages[{index}]", item) for index, item in enumerate(messages)]


def _check_message(param: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        checks.fail(param, f"must be an object, not {checks.kind_of(message)}")
    if "role" not in message:
        checks.fail(f"{param}.role", "is missing", code="missing_required_parameter")
    checks.text(f"{param}.role", message["role"], min_chars=1, max_chars=MAX_ROLE_CHARS)
    calls = message.get("tool_calls")
    if message.get("content") is None and not calls:
        checks.fail(f"{param}.content", "is missing", code="missing_required_parameter")
    if message.get("content") is not None:
        _check_content(f"{param}.content", message["content"])
    checked = dict(message)
    if calls:
        checked["tool_calls"] = [
            _check_call(f"{param}.tool_calls[{index}]", call)
            for index, call in enumerate(checks.items(f"{param}.tool_calls", calls, MAX_TOOLS))
        ]
    return checked


def _check_content(param: str, content: Any) -> None:
    """Content is text, or a list of text parts."""
    if isinstance(content, str):
        checks.text(param, content)
        return
    if not isinstance(content, list | tuple):
        checks.fail(param, f"must be text or a list of text parts, not {checks.shown(content)}")
    for index, part in enumerate(checks.items(param, content, MAX_MESSAGES)):
        name = f"{param}[{index}]"
        if not isinstance(part, dict):
            checks.fail(name, f"must be an object, not {checks.kind_of(part)}")
        if part.get("type") != "text":
            kind = checks.shown(part.get("type"))
            checks.fail(name, f"is of type {kind}; only text is supported")
        checks.text(f"{name}.text", part.get("text"))


def _check_call(param: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        checks.fail(param, 'must be an object with a "function"')
    function = call["function"]
    checks.text(f"{param}.function.name", function.get("name"), min_chars=1)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            checks.fail(f"{param}.function.arguments", "is not valid JSON")
    return {**call, "function": {**function, "arguments": arguments}}


def check_tools(value: Any) -> list[dict[str, Any]]:
    """Tools of a chat row, for the template.

    Raises:
        RequestError: not a list of functions with a name.
    """
    tools = checks.items("tools", value, MAX_TOOLS)
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            checks.fail(f"tools[{index}]", 'must be {"type": "function", "function": {...}}')
        checks.text(f"tools[{index}].function.name", function.get("name"), min_chars=1)
    return list(tools)


def check_template_kwargs(value: Any) -> dict[str, Any]:
    """Further variables for a chat template, which itself says which it reads.

    Raises:
        RequestError: not an object, or too many.
    """
    param = "chat_template_kwargs"
    if not isinstance(value, dict):
        checks.fail(param, f"must be an object, not {checks.shown(value)}")
    if len(value) > MAX_TEMPLATE_KWARGS:
        checks.fail(param, f"has {len(value)} entries; at most {MAX_TEMPLATE_KWARGS} are allowed")
    return value
