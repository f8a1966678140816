"""Single calls: chat, completions, embeddings, scores; and /v1/models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from batchwright.job.rows import CHAT, COMPLETIONS, ENDPOINTS
from batchwright.server.api_error import ApiError
from batchwright.server.parts import Parts
from batchwright.server.settings import MAX_CALL_BYTES
from batchwright.server.stream import events, take_stream_options


def call_routes(parts: Parts) -> list[Route]:
    """The routes, bound to a server's parts."""

    def route(endpoint: str) -> Route:
        async def call(request: Request) -> Response:
            return await _call(parts, endpoint, request)

        return Route(endpoint, call, methods=["POST"])

    async def list_models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(parts)]})

    async def retrieve_model(request: Request) -> Response:
        name = request.path_params["model"]
        if name != parts.settings.model_name:
            raise ApiError(
                404, f"there is no model {name!r:.100}", code="model_not_found", param="model"
            )
        return JSONResponse(_model(parts))

    return [
        *(route(endpoint) for endpoint in ENDPOINTS),
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", retrieve_model, methods=["GET"]),
    ]


async def _call(parts: Parts, endpoint: str, request: Request) -> Response:
    async with parts.bodies.read(request, MAX_CALL_BYTES) as body:
        streams, include_usage = False, False
        if endpoint in (CHAT, COMPLETIONS):
            streams, include_usage = take_stream_options(body)
        begun = await parts.calls.begin(endpoint, body)
        body.clear()
        if not streams:
            return JSONResponse(await parts.calls.finish(begun, _gone(request.receive)))
    answer = asyncio.ensure_future(parts.calls.finish(begun, asyncio.Event().wait))
    return StreamingResponse(
        events(endpoint, answer, include_usage), media_type="text/event-stream"
    )


def _gone(receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """Returns when the client has closed its connection."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return gone


def _model(parts: Parts) -> dict[str, Any]:
    return {
        "id": parts.settings.model_name,
        "object": "model",
        "created": parts.started_at,
        "owned_by": "batchwright",
        "max_model_len": parts.shared_engine.max_model_len,
    }
