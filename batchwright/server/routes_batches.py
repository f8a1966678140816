"""/v1/batches: create, list, retrieve, cancel."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from batchwright.job.rows import ENDPOINTS
from batchwright.server.api_error import ApiError, not_found
from batchwright.server.batch_record import Batch
from batchwright.server.bodies import only_known, text_of
from batchwright.server.parts import Parts
from batchwright.server.records import page
from batchwright.server.settings import MAX_SMALL_BYTES
from batchwright.server.stored_files import INPUT

MAX_METADATA = 16
_WINDOW = re.compile(r"([1-9][0-9]{0,3})([hd])")
_HOURS = {"h": 1, "d": 24}
MAX_WINDOW_HOURS = 24 * 365


def batch_routes(parts: Parts) -> list[Route]:
    """The routes, bound to a server's parts."""
    batches = parts.batches

    async def create(request: Request) -> Response:
        async with parts.bodies.read(request, MAX_SMALL_BYTES) as body:
            batch = _new_batch(parts, body)
        return JSONResponse(batches.show(await asyncio.to_thread(batches.create, batch)))

    async def list_batches(request: Request) -> Response:
        records = batches.records.all()
        return JSONResponse(
            page(records, request.query_params, default_limit=20, show=batches.show)
        )

    async def retrieve(request: Request) -> Response:
        id = request.path_params["id"]
        batch = batches.records.get(id)
        if batch is None:
            raise not_found("batch", id)
        return JSONResponse(batches.show(batch))

    async def cancel(request: Request) -> Response:
        batch = await asyncio.to_thread(batches.cancel, request.path_params["id"])
        return JSONResponse(batches.show(batch))

    return [
        Route("/v1/batches", create, methods=["POST"]),
        Route("/v1/batches", list_batches, methods=["GET"]),
        Route("/v1/batches/{id}", retrieve, methods=["GET"]),
        Route("/v1/batches/{id}/cancel", cancel, methods=["POST"]),
    ]


def _new_batch(parts: Parts, body: dict[str, Any]) -> Batch:
    if parts.is_stopping:
        raise ApiError(503, "the server is stopping", code="service_unavailable")
    only_known(body, ("input_file_id", "endpoint", "completion_window", "metadata"))
    endpoint = text_of(body, "endpoint")
    if endpoint not in ENDPOINTS:
        raise ApiError(
            400,
            f"endpoint is {endpoint!r:.100}; supported: {', '.join(ENDPOINTS)}",
            code="invalid_value",
            param="endpoint",
        )
    window = text_of(body, "completion_window")
    file_id = text_of(body, "input_file_id")
    file = parts.files.records.get(file_id)
    if file is None:
        raise ApiError(
            400, f"there is no file {file_id!r:.100}", code="not_found", param="input_file_id"
        )
    if file.purpose != INPUT:
        raise ApiError(
            400,
            f"{file_id} was not uploaded for batches",
            code="invalid_value",
            param="input_file_id",
        )
    return parts.batches.new(endpoint, file, window, _seconds(window), _metadata(body))


def _seconds(window: str) -> int:
    match = _WINDOW.fullmatch(window)
    hours = int(match[1]) * _HOURS[match[2]] if match else 0
    if not 1 <= hours <= MAX_WINDOW_HOURS:
        raise ApiError(
            400,
            f"completion_window is {window!r:.60}; write it like 24h or 7d, at most a year",
            code="invalid_value",
            param="completion_window",
        )
    return hours * 3600


def _metadata(body: dict[str, Any]) -> dict[str, str] | None:
    value = body.get("metadata")
    if value is None:
        return None
    sound = (
        isinstance(value, dict)
        and len(value) <= MAX_METADATA
        and all(len(key) <= 64 and isinstance(text, str) for key, text in value.items())
        and all(len(text) <= 512 for text in value.values())
    )
    if not sound:
        raise ApiError(
            400,
            f"metadata must be at most {MAX_METADATA} pairs of texts, of 64 and 512 characters",
            code="invalid_value",
            param="metadata",
        )
    return {str(key): str(text) for key, text in value.items()}
