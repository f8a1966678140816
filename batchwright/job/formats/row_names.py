"""The custom_ids of an input: each is given to one row, and rows without one get one."""

from __future__ import annotations

from typing import Any

from batchwright.errors import RequestError
from batchwright.job.formats.id_set import IdSet

MAX_ID_CHARS = 1000


class RowNames:
    """Sees to it that each custom_id is given to one row.

    Args:
        unit: what rows are counted in; automatic names are `{unit}-N`.
    """

    def __init__(self, unit: str = "line") -> None:
        self._unit = unit
        self._seen = IdSet()

    def take(self, custom_id: str | None, number: int) -> str:
        """The name of row `number`: the one it gives, or a free one.

        An automatic name is `line-7`, or `line-7-2` if a row before is called so.

        Raises:
            RequestError: an earlier row has the name that this one gives (duplicate_custom_id).
        """
        if custom_id is None:
            return self._invent(number)
        if self._seen.add(custom_id):
            return custom_id
        reason = "was used by an earlier row; each row needs its own"
        if custom_id.startswith(f"{self._unit}-"):
            reason += f" ({self._unit}-N is also what row N is called if it gives none)"
        raise RequestError(
            f"custom_id {custom_id!r} {reason}", code="duplicate_custom_id", param="custom_id"
        )

    def _invent(self, number: int) -> str:
        name, attempt = f"{self._unit}-{number}", 1
        while not self._seen.add(name):
            attempt += 1
            name = f"{self._unit}-{number}-{attempt}"
        return name


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
