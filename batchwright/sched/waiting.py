"""Waiting: sequences that hold no slot, and which of them is next."""

from __future__ import annotations

import heapq

from batchwright.plan.plan import Plan
from batchwright.sequence import Sequence


class Waiting:
    """New sequences wait in the plan. Those that were started or held back before go ahead of it,
    in job order.
    """

    def __init__(self) -> None:
        self._plan = Plan()
        self._returned: list[tuple[int, Sequence]] = []  # a heap by order
        self._only: frozenset[str] | None = None  # requests that may start; None: all
        self._held: list[Sequence] = []  # like those in _returned, but not in _only

    def append(self, sequence: Sequence) -> None:
        """A new sequence waits, behind all others."""
        self._plan.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence waits ahead of the plan."""
        if self._only is None or sequence.request.id in self._only:
            heapq.heappush(self._returned, (sequence.order, sequence))
        else:
            self._held.append(sequence)

    def next(self) -> Sequence | None:
        """The sequence to start next, which waits no more; None if there is none."""
        while self._returned:
            _, sequence = heapq.heappop(self._returned)
            if sequence.finish_reason is None:
                assert not sequence.num_in_flight
                return sequence
        return self._plan.next_admission() if self._only is None else None

    def admit_only(self, request_ids: frozenset[str] | None) -> None:
        """See Scheduler.admit_only."""
        self._only = request_ids
        waiting = [*self._held, *(sequence for _, sequence in self._returned)]
        self._held, self._returned = [], []
        for sequence in waiting:
            if sequence.finish_reason is None:
                self.put_back(sequence)

    def forget_in_flight(self) -> None:
        """No more tokens will come for sequences that were preempted."""
        for _, sequence in self._returned:
            sequence.num_in_flight = 0
