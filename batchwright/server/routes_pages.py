"""The page, what it reads, the batches' reports, metrics, and health."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from batchwright.errors import BatchwrightError, ConfigError
from batchwright.report import report_page
from batchwright.report.prometheus import prometheus_text
from batchwright.server.api_error import ApiError, not_found
from batchwright.server.dashboard import PAGE, PAGE_POLICY
from batchwright.server.guard import COOKIE
from batchwright.server.numbers import dashboard_numbers
from batchwright.server.parts import Parts

REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
)


def page_routes(parts: Parts, session: str) -> list[Route]:
    """The routes, bound to a server's parts.

    Args:
        session: what the page's cookie holds.
    """

    async def page(_: Request) -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})

    async def numbers(_: Request) -> Response:
        return JSONResponse(dashboard_numbers(parts))

    async def log_in(_: Request) -> Response:
        """Whoever gets here has shown the key; the page may read with its cookie from now on."""
        response = Response(status_code=204)
        response.set_cookie(COOKIE, session, httponly=True, samesite="strict")
        return response

    async def report(request: Request) -> Response:
        id = request.path_params["id"]
        if not parts.batches.has_report(id):
            raise not_found("report of batch", id)
        try:
            html = await asyncio.to_thread(report_page, parts.batches.job_path(id))
        except BatchwrightError as error:
            raise ApiError(501, str(error), code="report_unavailable") from error
        return HTMLResponse(html, headers={"Content-Security-Policy": REPORT_POLICY})

    async def metrics(_: Request) -> Response:
        try:
            text, kind = await asyncio.to_thread(prometheus_text, parts.batches.measured)
        except ConfigError as error:  # a package is missing
            raise ApiError(501, str(error), code="metrics_unavailable") from error
        return Response(text, media_type=kind)

    async def health(_: Request) -> Response:
        status = parts.health
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def no_icon(_: Request) -> Response:
        return Response(status_code=204)

    return [
        Route("/", page, methods=["GET"]),
        Route("/favicon.ico", no_icon, methods=["GET"]),
        Route("/dashboard.json", numbers, methods=["GET"]),
        Route("/dashboard/login", log_in, methods=["POST"]),
        Route("/batches/{id}/report", report, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
    ]
