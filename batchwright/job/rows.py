"""A row as a file gives it, before anything in it is believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchwright.errors import RequestError

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ENDPOINTS = (CHAT, COMPLETIONS)


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row that can be named and routed; its body is not validated yet.

    Attributes:
        line: 1-based line of the input file.
        custom_id: the user's name for the row, or `line-N` where a bare row has none.
        endpoint: one of ENDPOINTS.
        body: the request's parameters, as decoded from JSON.
        num_bytes: bytes of the input this row took, for progress.
    """

    line: int
    custom_id: str
    endpoint: str
    body: dict[str, Any]
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RowError:
    """A row that cannot even be routed. It fails alone.

    Attributes:
        line: 1-based line of the input file.
        custom_id: the row's name, if it could be read.
        error: why, with the line in it.
        num_bytes: bytes of the input this row took, for progress.
    """

    line: int
    custom_id: str | None
    error: RequestError
    num_bytes: int = 0
