"""The custom_ids of an input: each is given to one row, and rows without one get one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from typing import Any

from batchwright.errors import RequestError
from batchwright.job.formats.id_set import IdSet
from batchwright.job.rows import UNNAMED, AnyRow, RowError, groups

GROUP_ROWS = 256
MAX_ID_CHARS = 1000


def with_names(rows: Iterator[AnyRow], unit: str = "line") -> Iterator[AnyRow]:
    """See to it that each custom_id is given to one row, and that rows without one get one.

    An automatic name is `line-7`, or `line-7-2` if another row is called so. A row that gives a
    name that was used before becomes a RowError (duplicate_custom_id).

    Args:
        rows: as readers make them; UNNAMED rows get a name, rows named None cannot have one.
        unit: what rows are counted in.
    """
    with closing(IdSet()) as seen:
        for group in groups(rows, GROUP_ROWS):
            yield from _named(group, seen, unit)


def _named(group: list[AnyRow], seen: IdSet, unit: str) -> Iterator[AnyRow]:
    names = [
        automatic_name(row, unit) if row.custom_id == UNNAMED else row.custom_id for row in group
    ]
    are_new = iter(seen.add([name for name in names if name is not None]))
    for row, name in zip(group, names, strict=True):
        if name is None:
            yield row
            continue
        is_new = next(are_new)
        if row.custom_id == UNNAMED:
            yield replace(row, custom_id=name if is_new else _free_name(name, seen))
        elif is_new:
            yield row
        else:
            error = _used(name, row.line, unit)
            yield RowError(
                row.line, name, error, row.num_bytes, row.extra, pause_follows=row.pause_follows
            )


def automatic_name(row: AnyRow, unit: str = "line") -> str:
    """What a row is called that gives no name, if no other row is called so."""
    return f"{unit}-{row.line}"


def _free_name(name: str, seen: IdSet) -> str:
    attempts = (f"{name}-{number}" for number in count(2))
    return next(attempt for attempt in attempts if seen.add([attempt])[0])


def _used(name: str, line: int, unit: str) -> RequestError:
    reason = "was used by an earlier row; each row needs its own"
    if name.startswith(f"{unit}-"):
        reason += f" ({unit}-N is also what row N is called if it gives none)"
    return RequestError(
        f"custom_id {name!r} {reason}",
        code="duplicate_custom_id",
        param="custom_id",
        line=line,
    )


def id_text(key: str, value: Any) -> str:
    """A custom_id as text: a string of 1 to MAX_ID_CHARS characters, or a whole number.

    Raises:
        RequestError: anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= 1024:
        return str(value)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID_CHARS:
        raise RequestError(
            f"{key} must be a string of 1 to {MAX_ID_CHARS} characters, not {json_kind(value)}",
            param=key,
        )
    return value


def json_kind(value: object) -> str:
    """What a JSON value is, in JSON's words, short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return f"the number {value!s:.40}"
