"""Recovery: which request made a step fail.

A step that raises says nothing about which of its rows is to blame. They are suspects; they run
again in groups, halves of the group that failed, each to completion and alone, until a group of
one request fails: that request fails, and the others end well. Requests without rows in the failed
step hold meanwhile.

It ends. A failure outside of isolation makes groups of its s >= 1 suspects. Each later failure
replaces the running group by smaller, non-empty ones, at most s - 1 times because groups never
merge, or ends the only suspect of its step, at most s times. A group runs until all its requests
have ended, in error or well (so also those that fail only beside neighbours they no longer have);
then the s suspects are gone for good. N requests therefore cost at most 2N recoveries in all, and
what runs between two of them is an ordinary run of the scheduler, which ends.
"""

from __future__ import annotations

from collections.abc import Container

from batchwright.errors import RequestError

MAX_MESSAGE_CHARS = 200


class Isolation:
    """Groups of suspects; only the last one may run."""

    def __init__(self) -> None:
        self._groups: list[list[str]] = []

    @property
    def group(self) -> frozenset[str] | None:
        """Requests that may run now; None: all."""
        return frozenset(self._groups[-1]) if self._groups else None

    def failed(self, suspects: list[str], unfinished: Container[str]) -> str | None:
        """A step failed in which these requests had rows (none: those have ended meanwhile).

        Returns:
            The request that failed alone, or None: they have been divided, go on.
        """
        if not self._groups or not suspects:
            self._divide(suspects)
            return None
        group = [id for id in self._groups.pop() if id in unfinished]
        if len(suspects) > 1:
            self._push([id for id in group if id not in suspects])
            self._divide(suspects)
            return None
        self._push([id for id in group if id not in suspects])
        return suspects[0]

    def end_group(self) -> None:
        """All requests of the running group have ended."""
        self._groups.pop()

    def clear(self) -> None:
        """No request is left."""
        self._groups.clear()

    def replace(self, old: str, new: str) -> None:
        """Another request takes over the sequences of a suspect."""
        self._groups = [[new if id == old else id for id in group] for group in self._groups]

    def _divide(self, suspects: list[str]) -> None:
        middle = (len(suspects) + 1) // 2
        self._push(suspects[middle:])
        self._push(suspects[:middle])  # earlier rows first

    def _push(self, group: list[str]) -> None:
        if group:
            self._groups.append(group)


def describe(error: BaseException) -> str:
    """The exception's type and the first line of its message, cut."""
    lines = str(error).splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 3] + "..."


def internal_error(error: BaseException) -> RequestError:
    """The error of the row that is to blame for an exception."""
    return RequestError(
        f"the row could not be computed ({describe(error)}); other rows are not affected; "
        "run it again, and report it if it fails again",
        code="internal_error",
    )
