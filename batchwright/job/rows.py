"""A row as a file gives it, before anything in it is believed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from batchwright.errors import BatchwrightError, RequestError

UNNAMED = ""
"""The custom_id of a row that gives none, until `formats/row_names.py` gives it one."""

GROUP_BYTES = 16 * 2**20

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
SCORE = "/v1/score"
SCORE_ALIAS = "/score"
ENDPOINTS = (CHAT, COMPLETIONS, EMBEDDINGS, SCORE, SCORE_ALIAS)


def endpoint_of_bare_row(body: dict[str, Any]) -> str:
    """The endpoint that a row without a url means, told by what its body holds."""
    if "messages" in body:
        return CHAT
    if "input" in body:
        return EMBEDDINGS
    if "context" in body or "continuation" in body:
        return SCORE
    return COMPLETIONS


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row that can be named and routed; its body is not validated yet.

    Attributes:
        line: 1-based line of the input file.
        custom_id: the user's name for the row, or `line-N` where it gives none.
        endpoint: one of ENDPOINTS.
        body: the request's parameters, as decoded from JSON.
        num_bytes: bytes of the input this row took, for progress.
        extra: columns that pass through to the output.
        memory_bytes: about what it takes in memory; 0 if its reader sees to that.
        pause_follows: the next row has to be waited for, so this one should not wait for it.
    """

    line: int
    custom_id: str
    endpoint: str
    body: dict[str, Any]
    num_bytes: int = 0
    extra: dict[str, Any] | None = None
    memory_bytes: int = field(default=0, compare=False)
    pause_follows: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class RowError:
    """A row that cannot even be routed. It fails alone.

    Attributes:
        line: 1-based line of the input file.
        custom_id: the row's name, if it could be read.
        error: why, with the line in it.
        num_bytes: bytes of the input this row took, for progress.
        extra: columns that pass through to the output.
        pause_follows: as in InputRow.
    """

    line: int
    custom_id: str | None
    error: RequestError
    num_bytes: int = 0
    extra: dict[str, Any] | None = None
    pause_follows: bool = field(default=False, compare=False)
    memory_bytes: ClassVar[int] = 0


AnyRow = InputRow | RowError


def groups(rows: Iterator[AnyRow], max_rows: int) -> Iterator[list[AnyRow]]:
    """Rows in lists of at most max_rows, and of about GROUP_BYTES in memory; rows that are there
    do not wait for one that has still to be written.

    Rows before an error of the input come before the error.
    """
    group: list[AnyRow] = []
    num_bytes = 0
    try:
        for row in rows:
            group.append(row)
            num_bytes += row.memory_bytes
            if len(group) == max_rows or num_bytes >= GROUP_BYTES or row.pause_follows:
                yield group
                group, num_bytes = [], 0
    except BatchwrightError:
        if group:
            yield group
        raise
    if group:
        yield group
