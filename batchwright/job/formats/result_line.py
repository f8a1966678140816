"""Result lines: `{"id", "custom_id", "response", "error"}`, as the OpenAI batch API has them."""

from __future__ import annotations

from typing import Any

from batchwright.errors import RequestError
from batchwright.job.answer import response_id


def success_line(
    custom_id: str, body: dict[str, Any], columns: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The output line of a row that succeeded; `columns` are those that pass through."""
    request_id = response_id(custom_id)
    line: dict[str, Any] = {
        "id": f"batch_req_{request_id}",
        "custom_id": custom_id,
        "response": {"status_code": 200, "request_id": f"req_{request_id}", "body": body},
        "error": None,
    }
    return line if columns is None else {**line, "columns": columns}


def error_line(
    custom_id: str | None,
    line: int,
    error: RequestError,
    columns: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The error-file line of a row that failed; custom_id is None if it could not be read."""
    name = custom_id if custom_id is not None else f"line-{line}"
    if error.code == "duplicate_custom_id":  # the row that had it first has a line of its own
        name = f"{name}\0{line}"
    request_id = response_id(name)
    failure: dict[str, Any] = {
        "id": f"batch_req_{request_id}",
        "custom_id": custom_id,
        "response": None,
        "error": {
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "line": line,
        },
    }
    return failure if columns is None else {**failure, "columns": columns}
