"""VirtualClock: time that only moves when told to. Real time is read where files are."""

from __future__ import annotations


class VirtualClock:
    """Simulated time."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        assert seconds >= 0
        self._now_s += seconds
