"""Errors as OpenAI's HTTP API has them: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from starlette.responses import JSONResponse

from batchwright.errors import RequestError

logger = logging.getLogger(__name__)

_STATUS_OF_CODE = {
    "model_not_found": 404,
    "internal_error": 500,
    "invalid_logits": 500,
    "cancelled": 503,
}


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: the HTTP status.
        message: what was wrong, the value, the limit and the remedy.
        code: OpenAI's code where one fits.
        param: the parameter at fault.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as the body of a response."""
        return {
            "error": {
                "message": self.message,
                "type": _type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def failure(error: Exception) -> ApiError:
    """A bug of ours. The log says where and of what kind it is; its words may be a client's."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
    logger.error("a request failed: %s in %s", type(error).__name__, place)
    return ApiError(500, "the server failed; its log says where", code="internal")


def from_request_error(error: RequestError) -> ApiError:
    """The error of a row, as the error of a call."""
    status = _STATUS_OF_CODE.get(error.code, 400)
    return ApiError(status, error.message, code=error.code, param=error.param)


def missing(param: str) -> ApiError:
    """A parameter that has to be there is not."""
    return ApiError(400, f"{param} is missing", code="missing_required_parameter", param=param)


def not_found(kind: str, id: str) -> ApiError:
    """There is no file or batch with this id."""
    return ApiError(404, f"there is no {kind} {id!r:.100}", code="not_found", param="id")


def busy(message: str, *, status: int = 429, retry_after_s: int = 2) -> ApiError:
    """The server cannot take more at the moment."""
    code = "rate_limit_exceeded" if status == 429 else "service_unavailable"
    return ApiError(status, message, code=code, headers={"Retry-After": str(retry_after_s)})


def _type(status: int) -> str:
    if status in (401, 403):
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
