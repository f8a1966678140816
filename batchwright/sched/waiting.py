"""Waiting: sequences that hold no slot, and which of them is next."""

from __future__ import annotations

import heapq
from itertools import count

import numpy as np

from batchwright.plan.job_tree import Int64Array
from batchwright.plan.plan import Plan
from batchwright.request import Int32Array
from batchwright.sequence import NO_NODES, Sequence


class Waiting:
    """New sequences wait in the plan. Those that were started or held back before, and urgent ones,
    go ahead of it, by order.

    Args:
        plan: an empty one.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._returned: list[tuple[int, int, Sequence]] = []  # a heap by order, then by return
        self._num_returned = count()
        self._only: frozenset[str] | None = None  # requests that may start; None: all
        self._held: list[Sequence] = []  # like those in _returned, but not in _only

    def append(self, sequence: Sequence) -> None:
        """A new sequence waits, behind all others; an urgent one before them."""
        if sequence.request.urgent:
            self.put_back(sequence)
        else:
            self._plan.append(sequence)

    @property
    def is_urgent(self) -> bool:
        """Whether an urgent sequence is next."""
        first = self._returned[0][-1] if self._returned else None
        return first is not None and first.request.urgent and first.finish_reason is None

    @property
    def is_known(self) -> bool:
        """Whether the next sequence is settled: asking for it asks nothing of the plan."""
        return bool(self._returned) and self._returned[0][-1].finish_reason is None

    def put_back(self, sequence: Sequence) -> None:
        """A sequence waits ahead of the plan."""
        if self._only is None or sequence.request.id in self._only:
            entry = (sequence.order, next(self._num_returned), sequence)
            heapq.heappush(self._returned, entry)
        else:
            self._held.append(sequence)

    def refuse(self, sequence: Sequence) -> bool:
        """A sequence from `next`, which finds no room, is about to be put back.

        Returns:
            Whether others may go before it.
        """
        return self._plan.refuse(sequence)

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of prompts in a Step, at most."""
        return self._plan.max_prompt_tokens

    def next(self, num_running: int = 0) -> Sequence | None:
        """The sequence to start next, which waits no more; None if there is none.

        Args:
            num_running: sequences that run.
        """
        while self._returned:
            *_, sequence = heapq.heappop(self._returned)
            if sequence.finish_reason is None:
                assert not sequence.num_in_flight
                return sequence
        return self._plan.next_admission(num_running) if self._only is None else None

    def all(self) -> list[Sequence]:
        """Sequences that wait; of a row that has not started only the first."""
        returned = [s for *_, s in self._returned if s.finish_reason is None]
        return returned + self._plan.waiting()

    def next_use(self, nodes: Int32Array) -> Int64Array:
        """[num_nodes] int64, how soon each node will be used again; the smaller the sooner."""
        use = self._plan.next_use(nodes)
        returned = self.returned_nodes()
        if len(returned):
            use[np.isin(nodes, returned)] = -1
        return use

    def returned_nodes(self) -> Int32Array:
        """Nodes of those that go ahead of the plan, which are used again first."""
        returned = (s.nodes for *_, s in self._returned if s.finish_reason is None)
        return np.concatenate([NO_NODES, *returned])

    def admit_only(self, request_ids: frozenset[str] | None) -> None:
        """See Scheduler.admit_only."""
        self._only = request_ids
        waiting = [*self._held, *(sequence for *_, sequence in self._returned)]
        self._held, self._returned = [], []
        for sequence in waiting:
            if sequence.finish_reason is None:
                self.put_back(sequence)

    def forget_in_flight(self) -> None:
        """No more tokens will come for sequences that were preempted."""
        for *_, sequence in self._returned:
            sequence.num_in_flight = 0
