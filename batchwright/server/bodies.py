"""Reading the bodies of requests: bounded one by one, all together, and in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.requests import Request

from batchwright.server.api_error import ApiError, busy, missing

_decode = msgspec.json.Decoder().decode


class Bodies:
    """Bodies in memory, of calls that are being read or wait for their answers.

    Args:
        max_bytes: of all of them together.
        timeout_s: in which one has to arrive.
    """

    def __init__(self, *, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self.num_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request, max_bytes: int) -> AsyncIterator[dict[str, Any]]:
        """The JSON object of a request's body, counted as long as the context is open.

        Raises:
            ApiError: 413 too large, 408 too slow, 429 too much at once, 400 not a JSON object.
        """
        size = 0

        def note(num_bytes: int) -> None:
            nonlocal size
            size += num_bytes
            self._take(num_bytes)
            if size > max_bytes:
                raise too_large(size, max_bytes)

        try:
            yield _object(await self._read(request, max_bytes, note))
        finally:
            self.num_bytes -= size

    async def _read(self, request: Request, max_bytes: int, note: Callable[[int], None]) -> bytes:
        declared_bytes(request, max_bytes)
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    note(len(chunk))
                    chunks.append(chunk)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None
        return b"".join(chunks)

    def _take(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self.num_bytes > self._max_bytes:
            raise busy("requests hold too much memory at the moment; try again later")


def declared_bytes(request: Request, max_bytes: int) -> int | None:
    """The size that a request says its body has.

    Raises:
        ApiError: it is too large (413), or no number (400).
    """
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not text.isdecimal():
        raise ApiError(400, "Content-Length is not a number", code="invalid_request")
    if int(text) > max_bytes:
        raise too_large(int(text), max_bytes)
    return int(text)


def too_large(num_bytes: int, max_bytes: int) -> ApiError:
    """A body is over the limit."""
    return ApiError(
        413,
        f"the body has {num_bytes:,} bytes or more; at most {max_bytes:,} are taken",
        code="request_too_large",
    )


def only_known(body: dict[str, Any], known: tuple[str, ...]) -> None:
    """Refuse parameters that nobody knows, instead of ignoring them.

    Raises:
        ApiError: it names the first.
    """
    for name, value in body.items():
        if name not in known and value is not None:
            raise ApiError(
                400,
                f"unknown parameter {name!r:.100}; known: {', '.join(known)}",
                code="unknown_parameter",
                param=name[:100],
            )


def text_of(body: dict[str, Any], name: str, max_chars: int = 256) -> str:
    """A parameter that has to be a text.

    Raises:
        ApiError: it is missing or something else.
    """
    value = body.get(name)
    if value is None:
        raise missing(name)
    if not isinstance(value, str) or len(value) > max_chars:
        raise ApiError(
            400,
            f"{name} must be a text of at most {max_chars} characters",
            code="invalid_value",
            param=name,
        )
    return value


def _object(raw: bytes) -> dict[str, Any]:
    if not raw:
        raise ApiError(400, "the request has no body; it needs a JSON object", code="invalid_json")
    try:
        value = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value
