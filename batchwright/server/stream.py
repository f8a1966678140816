"""Streamed answers (`stream: true`): server-sent events in OpenAI's form.

The engine answers a request when it is whole, so each choice comes in one piece, after the comments
that keep the connection alive meanwhile. Clients that only stream work; they get no token early.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from batchwright.job.rows import CHAT
from batchwright.server.api_error import ApiError, failure

KEEP_ALIVE_S = 10.0


def take_stream_options(body: dict[str, Any]) -> tuple[bool, bool]:
    """Remove the parameters of streaming from a body: (stream?, tell the usage?).

    Raises:
        ApiError: they make no sense.
    """
    stream = body.pop("stream", None)
    options = body.pop("stream_options", None)
    if stream not in (None, True, False) or not isinstance(stream, bool | None):
        raise ApiError(400, "stream must be true or false", code="invalid_value", param="stream")
    if options is None:
        return bool(stream), False
    if not stream or not isinstance(options, dict):
        raise ApiError(
            400, "stream_options needs stream: true", code="invalid_value", param="stream_options"
        )
    unknown = options.keys() - {"include_usage", "include_obfuscation"}
    if unknown or not isinstance(options.get("include_usage", False), bool):
        raise ApiError(
            400,
            "stream_options knows include_usage, true or false",
            code="invalid_value",
            param="stream_options",
        )
    return True, options.get("include_usage", False)


async def events(
    endpoint: str, answer: asyncio.Future[dict[str, Any]], include_usage: bool
) -> AsyncIterator[bytes]:
    """The events of an answer that is being computed."""
    try:
        while True:
            done, _ = await asyncio.wait({answer}, timeout=KEEP_ALIVE_S)
            if done:
                break
            yield b": the answer is being computed\n\n"
        try:
            body = answer.result()
        except Exception as error:  # noqa: BLE001 - the status is sent, so it is told here
            told = error if isinstance(error, ApiError) else failure(error)
            yield _event(told.body)
            return
        for chunk in _chunks(endpoint, body, include_usage):
            yield _event(chunk)
        yield b"data: [DONE]\n\n"
    finally:
        answer.cancel()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _chunks(endpoint: str, body: dict[str, Any], include_usage: bool) -> list[dict[str, Any]]:
    is_chat = endpoint == CHAT
    head = {
        "id": body["id"],
        "object": "chat.completion.chunk" if is_chat else "text_completion",
        "created": body["created"],
        "model": body["model"],
    }
    chunks = []
    for choice in body["choices"]:
        parts = _chat_parts(choice) if is_chat else [choice]
        chunks += [{**head, "choices": [part]} for part in parts]
    if include_usage:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        chunks.append({**head, "choices": [], "usage": body["usage"]})
    return chunks


def _chat_parts(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole message as one delta, then how it ended."""
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [
            {"index": index, **call} for index, call in enumerate(delta["tool_calls"])
        ]
    index = choice["index"]
    return [
        {"index": index, "delta": delta, "logprobs": choice["logprobs"], "finish_reason": None},
        {"index": index, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]},
    ]
