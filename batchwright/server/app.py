"""The application: routes behind the guard, and errors in one form."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from batchwright.errors import OutputError
from batchwright.server.api_error import ApiError
from batchwright.server.guard import Guard
from batchwright.server.parts import Parts
from batchwright.server.routes_batches import batch_routes
from batchwright.server.routes_calls import call_routes
from batchwright.server.routes_files import file_routes
from batchwright.server.routes_pages import page_routes

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def make_app(parts: Parts) -> Guard:
    """The whole application of a server."""
    settings = parts.settings
    hosts = frozenset((*LOCAL_NAMES, settings.host.lower())) if settings.is_local else None
    app = Starlette(
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            OutputError: _output_error,
            ClientDisconnect: _gone,
            Exception: _bug,
        }
    )
    guard = Guard(app, api_key=settings.api_key, hosts=hosts)
    app.router.redirect_slashes = False
    app.router.routes += [
        *file_routes(parts),
        *batch_routes(parts),
        *call_routes(parts),
        *page_routes(parts, guard.session),
    ]
    return guard


def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _http_error(request: Request, error: Exception) -> Response:
    """The router's own: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    message = f"{what:.200} is not known here; see docs/serve.md"
    return ApiError(error.status_code, message, code="unknown_url").response()


def _output_error(_: Request, error: Exception) -> Response:
    return ApiError(507, "the server's disk fails or is full", code="storage").response()


def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)


def _bug(_: Request, error: Exception) -> Response:
    """Starlette raises it again after this, and the guard logs it."""
    return ApiError(500, "the server failed; its log says where", code="internal").response()
