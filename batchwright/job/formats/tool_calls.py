"""Splitting tool calls out of a chat's answer, in the forms that models are trained to write.

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number, among text
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
              or [TOOL_CALLS]name[CALL_ID]id[ARGS]{...}, any number; middle parts may be missing
    llama     <|python_tag|>{"name": ..., "parameters": {...}}; {...}: the whole text, tag optional

Only calls of functions that the row gave, with an object for arguments, count; everything else
stays text. Arguments keep the model's own spelling. Each form takes time linear in the text:
texts are split at marks, never searched again from each of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import msgspec

from batchwright.text.markup import TOOL_MARKS

_HERMES_START, _HERMES_END = TOOL_MARKS["hermes"]
_MISTRAL_START, _MISTRAL_ID, _MISTRAL_ARGS = TOOL_MARKS["mistral"]
(_LLAMA_START,) = TOOL_MARKS["llama"]
_BETWEEN = re.compile(r"[\s;]*")
_JSON_ERRORS = (msgspec.DecodeError, UnicodeError, RecursionError)


class ToolCall(NamedTuple):
    """A call of a function; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class _Written(msgspec.Struct):
    """A call as models write it, under either name of the arguments."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")


_decode_one = msgspec.json.Decoder(_Written).decode
_decode_list = msgspec.json.Decoder(list[_Written]).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode
_scan = json.JSONDecoder().raw_decode  # says where a value ends


def split_tool_calls(text: str, form: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """Split a text.

    Args:
        text: what the model wrote, special tokens that are marks included.
        form: a key of `text.markup.TOOL_MARKS`.
        names: the functions that may be called.
    Returns:
        (the rest of the text, the calls in order). Without calls the text is as it was.
    """
    rest, calls = _SPLITTERS[form](text, names)
    return (rest.strip(), calls) if calls else (text, [])


def call_id(custom_id: str, choice: int, place: int, form: str) -> str:
    """A call's id: a pure function of the row's name, the choice and the call's place in it.

    Templates of the mistral form insist on nine letters and digits.
    """
    name = f"{choice} {place} {custom_id}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=12).hexdigest()
    return digest[:9] if form == "mistral" else f"call_{digest}"


def _hermes(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    before, *pieces = text.split(_HERMES_START)
    rest, calls = [before], []
    for piece in pieces:
        inside, _, after = piece.partition(_HERMES_END)
        call = _one(inside, names)
        if call is None:
            rest.append(_HERMES_START + piece)
        else:
            calls.append(call)
            rest.append(after)
    return "".join(rest), calls


def _mistral(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    before, *pieces = text.split(_MISTRAL_START)
    rest, calls = [before], []
    for piece in pieces:
        found = _many(piece, names) if piece.lstrip().startswith("[") else _named(piece, names)
        if not found:
            rest.append(_MISTRAL_START + piece)
        calls += found
    return "".join(rest), calls


def _llama(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """All of the text, or nothing: JSON alone may as well be an answer."""
    inside = text.strip().removeprefix(_LLAMA_START).strip()
    calls = []
    start = 0
    while start < len(inside):
        try:
            _, end = _scan(inside, start)
        except (ValueError, RecursionError):
            return text, []
        call = _one(inside[start:end], names)
        if call is None:
            return text, []
        calls.append(call)
        between = _BETWEEN.match(inside, end)
        assert between is not None
        start = between.end()
    return "", calls


def _one(text: str, names: Collection[str]) -> ToolCall | None:
    try:
        return _checked(_decode_one(text), names)
    except _JSON_ERRORS:
        return None


def _many(text: str, names: Collection[str]) -> list[ToolCall]:
    """A list of calls; empty if one of them does not count."""
    try:
        calls = [_checked(written, names) for written in _decode_list(text)]
    except _JSON_ERRORS:
        return []
    return [call for call in calls if call is not None] if None not in calls else []


def _named(text: str, names: Collection[str]) -> list[ToolCall]:
    """A name and its arguments."""
    head, mark, arguments = text.partition(_MISTRAL_ARGS)
    if not mark:
        head, brace, arguments = text.partition("{")
        arguments = brace + arguments
    name = head.partition(_MISTRAL_ID)[0].strip()
    call = _call(name, arguments.strip(), names)
    return [call] if call is not None else []


def _checked(written: _Written, names: Collection[str]) -> ToolCall | None:
    raw = bytes(written.arguments) or bytes(written.parameters) or b"{}"
    return _call(written.name, raw.decode(), names)


def _call(name: str, arguments: str, names: Collection[str]) -> ToolCall | None:
    try:
        _decode_object(arguments)
    except _JSON_ERRORS:
        return None
    return ToolCall(name, arguments) if name in names else None


_SPLITTERS: dict[str, Callable[[str, Collection[str]], tuple[str, list[ToolCall]]]] = {
    "hermes": _hermes,
    "mistral": _mistral,
    "llama": _llama,
}
