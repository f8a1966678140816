"""Clocks, always passed in: the wall's, and one that only moves when told to."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since an arbitrary start."""

    def now(self) -> float: ...


class WallClock:
    """Real time."""

    def now(self) -> float:
        return time.perf_counter()


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
