"""/v1/files: upload, list, retrieve, delete, content."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from batchwright.server.api_error import ApiError, not_found
from batchwright.server.parts import Parts
from batchwright.server.records import page
from batchwright.server.stored_files import StoredFile


def file_routes(parts: Parts) -> list[Route]:
    """The routes, bound to a server's parts."""
    files = parts.files

    def found(request: Request) -> StoredFile:
        id = request.path_params["id"]
        file = files.records.get(id)
        if file is None:
            raise not_found("file", id)
        return file

    async def upload(request: Request) -> Response:
        if parts.is_stopping:
            raise ApiError(503, "the server is stopping", code="service_unavailable")
        return JSONResponse((await files.receive(request)).show())

    async def list_files(request: Request) -> Response:
        records = files.records.all()
        if (purpose := request.query_params.get("purpose")) is not None:
            records = [file for file in records if file.purpose == purpose]
        show = StoredFile.show
        return JSONResponse(page(records, request.query_params, default_limit=10_000, show=show))

    async def retrieve(request: Request) -> Response:
        return JSONResponse(found(request).show())

    async def content(request: Request) -> Response:
        file = found(request)
        if not files.path(file.id).is_file():
            raise ApiError(404, f"the bytes of {file.id} are gone", code="not_found", param="id")
        return FileResponse(
            files.path(file.id), media_type="application/octet-stream", filename=file.filename
        )

    def refuse_if_used(file: StoredFile) -> None:
        if (batch := parts.batches.uses(file)) is not None:
            raise ApiError(
                409, f"{batch.id} still needs the file; cancel it first", code="conflict"
            )

    async def delete(request: Request) -> Response:
        file = found(request)
        await asyncio.to_thread(files.delete, file.id, refuse_if_used)
        await asyncio.to_thread(parts.batches.forget_answers, file)
        return JSONResponse({"id": file.id, "object": "file", "deleted": True})

    return [
        Route("/v1/files", upload, methods=["POST"]),
        Route("/v1/files", list_files, methods=["GET"]),
        Route("/v1/files/{id}", retrieve, methods=["GET"]),
        Route("/v1/files/{id}", delete, methods=["DELETE"]),
        Route("/v1/files/{id}/content", content, methods=["GET"]),
    ]
