"""Watchdog: says so when one step takes far longer than the others. It never ends anything."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from statistics import median

logger = logging.getLogger(__name__)

MIN_S = 60.0
TIMES_MEDIAN = 20
POLL_S = 5.0


class Watchdog:
    """Watches steps from a thread of its own, which starts with the first step.

    Args:
        now: seconds, monotonic.
        poll_s: how often the thread looks; None: it is not started, someone else calls `check`.
    """

    def __init__(
        self, now: Callable[[], float] = time.monotonic, poll_s: float | None = POLL_S
    ) -> None:
        self._now = now
        self._poll_s = poll_s
        self._durations: deque[float] = deque(maxlen=101)
        # (started, query tokens, rows) of the running step. One attribute, so that the thread
        # sees all of one step or nothing.
        self._running: tuple[float, int, int] | None = None
        self._reported: tuple[float, int, int] | None = None
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def begin(self, num_tokens: int, num_rows: int) -> None:
        """A step starts."""
        if self._thread is None and self._poll_s is not None and not self._closed.is_set():
            # The thread must not keep an engine alive that nobody closed.
            arguments = weakref.ref(self), self._closed, self._poll_s
            self._thread = threading.Thread(
                target=_watch, args=arguments, name="batchwright-watchdog", daemon=True
            )
            self._thread.start()
        self._running = self._now(), num_tokens, num_rows

    def end(self) -> None:
        """The step is over, well or not."""
        if self._running is not None:
            self._durations.append(self._now() - self._running[0])
        self._running = None

    @property
    def limit_s(self) -> float:
        """A step that takes longer than this is late."""
        return max(MIN_S, TIMES_MEDIAN * self._usual_s())

    def check(self) -> None:
        """Log a warning if the running step is late and has not been reported."""
        running = self._running
        if running is None or running is self._reported:
            return
        started, num_tokens, num_rows = running
        elapsed_s, usual_s = self._now() - started, self._usual_s()
        if elapsed_s <= self.limit_s:
            return
        self._reported = running
        logger.warning(
            "a step of %d tokens in %d rows has been running for %.0f s (usual: %.2f s); "
            "it may be stuck, or the machine is busy with something else",
            num_tokens,
            num_rows,
            elapsed_s,
            usual_s,
        )

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _usual_s(self) -> float:
        durations = self._durations.copy()
        return median(durations) if durations else 0.0


def _watch(
    watchdog: weakref.ReferenceType[Watchdog], closed: threading.Event, poll_s: float
) -> None:
    while not closed.wait(poll_s):
        alive = watchdog()
        if alive is None:
            return
        alive.check()
        del alive
