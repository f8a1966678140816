"""How a running job is asked to stop: once to finish what runs, twice to end at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StopControl:
    """A request to stop, made from a signal handler or by another part of the program.

    The second request raises KeyboardInterrupt in the running step, and only there: a line that is
    being written is written whole, and counted. From the third on it is raised wherever the
    program is (it may be waiting for input).
    """

    def __init__(self) -> None:
        self._num_requests = 0
        self._interruptible = False

    @property
    def requested(self) -> bool:
        """Whether the job was asked to stop."""
        return self._num_requests > 0

    def request(self) -> None:
        """Ask to stop; from a signal handler of the thread that runs the job.

        Raises:
            KeyboardInterrupt: on the second call inside `interruptible`, on the third anywhere.
        """
        self._num_requests += 1
        if self._num_requests > (1 if self._interruptible else 2):
            raise KeyboardInterrupt

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work inside may be cut short by KeyboardInterrupt.

        Raises:
            KeyboardInterrupt: stopping at once was asked for before or inside.
        """
        self._interruptible = True
        try:
            if self._num_requests > 1:
                raise KeyboardInterrupt
            yield
        finally:
            self._interruptible = False
