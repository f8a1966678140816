"""Plan: a pull source of the rows to start next, in an order over the rows known so far.

It knows the rows read so far, not the whole job; rows may be appended at any time. They are ordered
anew when the new ones have become a good part of those that wait, so that ordering costs little per
row and the first row starts before the last is read. They are also ordered anew when rows that have
ended tell more about how long the others will be.

The last rows, no more than run at once, start longest first whatever the order is, unless it says
otherwise: then no long row is left to run alone at the end.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from batchwright.plan.dual_scan import DualScan, MemorySplit, Pick
from batchwright.plan.expected_lengths import ExpectedLengths
from batchwright.plan.job_tree import Int64Array, JobTree, build_job_tree
from batchwright.plan.lengths.declared import Predictor as Declared
from batchwright.plan.order import JobFacts, OrderFunction
from batchwright.plan.orders.fcfs import fcfs
from batchwright.request import Int32Array
from batchwright.sequence import NO_SLOT, Sequence

NEW_SHARE = 0.25
"""Rows are ordered anew when the new ones reach this share of the ordered ones that wait."""

MORE_ENDED = 2
"""And when so many times the rows have ended as when they were ordered last, for lengths."""

LEAST_ENDED = 16

NO_LIMIT = 2**30

LOOK_AHEAD_BLOCKS = 32_768
"""Prompt blocks of coming rows that are looked at to tell when a block is used next."""

NOT_SOON = np.iinfo(np.int64).max // 2


class InOrder:
    """Rows from the front of an order."""

    def __init__(self, rows: Int32Array) -> None:
        self._rows, self._line = rows, 0

    def __len__(self) -> int:
        return len(self._rows) - self._line

    def pick(self, in_use: MemorySplit, but: Collection[bool] = ()) -> Pick | None:
        """The next row, whatever memory is in use."""
        if self._line == len(self._rows):
            return None
        self._line += 1
        return Pick(int(self._rows[self._line - 1]), True, 0.0)

    def rest(self) -> Int32Array:
        """Rows not picked yet, in the order in which they will be."""
        return self._rows[self._line :]


class Plan:
    """Sequences that are known and were never started, and which of them is next.

    Args:
        order: a function of `plan/orders`.
        block_size: tokens of a prompt block, of which `Sequence.nodes` has one number each.
        kv_tokens: KV memory in tokens, for orders that divide it.
        num_slots: rows that run at once, at most.
        expected: output lengths, by default all that rows may have.
    """

    def __init__(
        self,
        order: OrderFunction = fcfs,
        *,
        block_size: int = 1,
        kv_tokens: int = 0,
        num_slots: float = math.inf,
        expected: ExpectedLengths | None = None,
    ) -> None:
        self._order = order
        self._block_size = block_size
        self._kv_tokens, self._num_slots = kv_tokens, num_slots
        self._expected = expected or ExpectedLengths(Declared())
        self._num_ended = 0  # rows that had ended when the others were ordered
        self._most_running = 0
        self._has_tail = False  # the rows that wait are the last, longest first
        self._new: list[Sequence] = []  # not ordered yet
        self._rows: list[Sequence | None] = []  # ordered last, as they came; None once started
        self._scan: InOrder | DualScan = InOrder(np.empty(0, np.int32))
        self._unfinished: list[tuple[Sequence, Pick]] = []  # only if the scan has two ends
        self._refused: dict[bool, Sequence] = {}  # by end, the left one being True
        self._num_started = 0
        self._next_use: Int64Array = np.empty(0, np.int64)  # by node, counted in starts

    def append(self, sequence: Sequence) -> None:
        """Add a row."""
        self._new.append(sequence)

    def next_admission(self, num_running: int = 0) -> Sequence | None:
        """The row to start next, which leaves the plan; None when there is none for now.

        Args:
            num_running: sequences that run: as many as ever ran are the last ones.
        """
        self._most_running = max(self._most_running, num_running + 1)
        while True:  # a cancelled row, which is skipped, may be the last before new ones
            if self._is_due():
                self._make_order()
            if not self._has_tail and len(self._scan) <= self._most_running and not self._new:
                self._order_tail()
            pick = self._scan.pick(self._memory_in_use(), self._closed_ends())
            if pick is None:
                return None
            sequence, self._rows[pick.row] = self._rows[pick.row], None
            self._num_started += 1
            assert sequence is not None
            if sequence.finish_reason is None:
                if isinstance(self._scan, DualScan):
                    self._unfinished.append((sequence, pick))
                return sequence

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of prompts in a Step, at most, that keep the balance of the order."""
        if isinstance(self._scan, DualScan) and not self._scan.has_met:
            return self._scan.prompt_tokens
        return NO_LIMIT

    def refuse(self, sequence: Sequence) -> bool:
        """A row from here finds no room: as long as it waits, no other comes from its end.

        Returns:
            Whether rows from another end may go before it.
        """
        if not isinstance(self._scan, DualScan):
            return False
        for one, pick in reversed(self._unfinished):
            if one is sequence:
                self._refused[pick.is_left] = sequence
                return True
        return False

    def _closed_ends(self) -> Collection[bool]:
        """Ends of the order from which a row waits that was refused."""
        for is_left, sequence in [*self._refused.items()]:
            if sequence.slot != NO_SLOT or sequence.finish_reason is not None:
                del self._refused[is_left]
        return self._refused.keys()

    def next_use(self, nodes: Int32Array) -> Int64Array:
        """[num_nodes] int64, about how many rows start before the next that uses each node."""
        if len(nodes) and int(nodes.max()) >= len(self._next_use):
            self._count_next_use(int(nodes.max()) + 1)
        elif (self._next_use[nodes] < self._num_started).any():
            self._count_next_use(len(self._next_use))
        return self._next_use[nodes] - self._num_started

    def waiting(self) -> list[Sequence]:
        """Rows that have not been started."""
        ordered = (s for s in self._rows if s is not None)
        return [s for s in (*ordered, *self._new) if s.finish_reason is None]

    # Ordering ---------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        if self._order is not fcfs and len(self._scan):
            known = max(LEAST_ENDED, MORE_ENDED * self._num_ended)
            if self._expected.num_ended >= known:
                return True
        if not self._new:
            return False
        if self._order is fcfs:  # new rows come after the others in any case
            return not len(self._scan)
        return len(self._new) >= NEW_SHARE * len(self._scan)

    def _make_order(self) -> None:
        """Order all rows that wait, going on with the row that would have been next."""
        rest = self._scan.rest()
        following = self._waiting(rest.tolist())
        sequences = self._waiting(np.sort(rest).tolist())
        sequences += [sequence for sequence in self._new if sequence.finish_reason is None]
        self._new = []
        self._rows = [*sequences]
        self._has_tail = self._order is fcfs
        self._num_ended = self._expected.num_ended
        if self._order is fcfs:
            self._scan = InOrder(np.arange(len(sequences), dtype=np.int32))
            return
        self._expected.estimate(sequences)
        continues = sequences.index(following[0]) if following else None
        order = self._order(job_facts(sequences, self._block_size, continues))
        if order.units is not None and len(sequences):
            self._scan = DualScan(order, self._kv_tokens, self._num_slots)
        else:
            self._scan = InOrder(order.rows)
        self._next_use = np.empty(0, np.int64)
        renumber([sequences[row] for row in self._scan.rest().tolist()])

    def _order_tail(self) -> None:
        """Let the rows that are left start longest first; equals as they would have."""
        self._has_tail = True
        rest = self._scan.rest()
        sequences = [self._rows[row] for row in rest.tolist()]
        lengths = np.array([0.0 if s is None else expected_output(s) for s in sequences])
        if len(rest) < 2 or (lengths[1:] <= lengths[:-1]).all():
            return
        self._scan = InOrder(rest[np.argsort(-lengths, kind="stable")])
        self._next_use = np.empty(0, np.int64)
        renumber([s for row in self._scan.rest().tolist() if (s := self._rows[row]) is not None])

    def _waiting(self, rows: list[int]) -> list[Sequence]:
        sequences = (self._rows[row] for row in rows)
        return [s for s in sequences if s is not None and s.finish_reason is None]

    def _memory_in_use(self) -> MemorySplit:
        """KV tokens expected of unfinished rows from either end."""
        if not isinstance(self._scan, DualScan):
            return MemorySplit(0.0, 0.0)
        self._unfinished = [
            (sequence, pick)
            for sequence, pick in self._unfinished
            if sequence.finish_reason is None
        ]
        left = sum(pick.kv_tokens for _, pick in self._unfinished if pick.is_left)
        total = sum(pick.kv_tokens for _, pick in self._unfinished)
        return MemorySplit(left, total - left)

    def _count_next_use(self, num_nodes: int) -> None:
        """Look through the coming rows, as far as LOOK_AHEAD_BLOCKS go."""
        coming, num_blocks = [], 0
        for sequence in (*self._waiting(self._scan.rest().tolist()), *self._new):
            coming.append(sequence.nodes)
            num_blocks += len(sequence.nodes)
            if num_blocks > LOOK_AHEAD_BLOCKS:
                break
        nodes = np.concatenate([np.empty(0, np.int32), *coming])
        num_nodes = max(num_nodes, int(nodes.max(initial=-1)) + 1)
        self._next_use = np.full(num_nodes, NOT_SOON + self._num_started, np.int64)
        places = np.repeat(np.arange(len(coming)), [len(path) for path in coming])
        # Of several values for a node the last one stays: that of the first row.
        self._next_use[nodes[::-1]] = self._num_started + places[::-1]


def job_facts(sequences: Seq[Sequence], block_size: int, continues: int | None = None) -> JobFacts:
    """What an order is made from.

    A row whose samples wait with it counts once, with the output of all.
    """

    def make_tree() -> JobTree:
        paths = [sequence.nodes for sequence in sequences]
        offsets = np.cumsum([0, *(len(path) for path in paths)])
        tree = build_job_tree(np.concatenate([np.empty(0, np.int32), *paths]), offsets)
        return replace(tree, depth=tree.depth * np.int32(block_size))

    return JobFacts(
        num_prompt_tokens=np.array([s.num_prompt_tokens for s in sequences], np.int64),
        num_output_tokens=np.array(
            [expected_output(s) * (1 + len(s.siblings)) for s in sequences], np.float64
        ),
        make_tree=make_tree,
        continues=continues,
    )


def expected_output(sequence: Sequence) -> float:
    """Output tokens that a sequence will have, as far as is known."""
    if sequence.expected_output is None:
        return sequence.max_len - sequence.num_prompt_tokens
    return sequence.expected_output


def renumber(sequences: Seq[Sequence]) -> None:
    """Let the places in the job that these have between them follow the order given here."""
    members = [member for first in sequences for member in (first, *first.siblings)]
    places = sorted(member.order for member in members)
    for member, place in zip(members, places, strict=True):
        member.order = place
