"""How a running job is asked to stop: once to finish what runs, twice to end at once.

A KeyboardInterrupt that no StopControl raised can come between any two instructions. The job then
commits nothing more and passes it on; what was committed before stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StoppedAtOnce(KeyboardInterrupt):
    """The job was asked to stop at once, where it can."""


class StopControl:
    """A request to stop, made from a signal handler or by another part of the program.

    The second request raises StoppedAtOnce in the running step, and only there: a line that is
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
            StoppedAtOnce: on the second call inside `interruptible`, on the third anywhere.
        """
        self._num_requests += 1
        if self._num_requests > (1 if self._interruptible else 2):
            raise StoppedAtOnce

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work inside may be cut short by StoppedAtOnce.

        Raises:
            StoppedAtOnce: stopping at once was asked for before or inside.
        """
        self._interruptible = True
        try:
            if self._num_requests > 1:
                raise StoppedAtOnce
            yield
        finally:
            self._interruptible = False
