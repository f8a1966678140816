"""Plan: a pull source of the rows to start next, in first-come order.

It knows the rows read so far, not the whole job; rows may be appended while it runs.
"""

from __future__ import annotations

from collections import deque

from batchwright.sequence import Sequence


class Plan:
    """Sequences that are known and were never started."""

    def __init__(self) -> None:
        self._waiting: deque[Sequence] = deque()

    def append(self, sequence: Sequence) -> None:
        """Add a row at the end."""
        self._waiting.append(sequence)

    def next_admission(self) -> Sequence | None:
        """The row to start next, which leaves the plan; None when there is none."""
        while self._waiting:
            sequence = self._waiting.popleft()
            if sequence.finish_reason is None:  # cancelled rows are skipped when they come up
                return sequence
        return None
