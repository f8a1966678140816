"""Equal Steps: coming Steps that differ from one another by one more token per row only.

While every running sequence feeds back the token it drew, none ends, none can start and blocks
suffice, there is nothing to decide. A simulator charges such Steps at once: what 400 Steps of 256
rows change in the books is a few array operations.

Everything here comes to the same as making the Steps one by one (tests/sched/test_equal_steps.py).
Only the ids of new blocks may be dealt out to rows in another order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from batchwright.kv.block_table import BlockTable
from batchwright.request import Int32Array
from batchwright.sched.books import Books
from batchwright.sched.closed_steps import Closed, ClosedSteps, most_steps
from batchwright.sched.forecast import Forecast
from batchwright.sched.intake import Intake, SchedulerStats, Update
from batchwright.sched.limits import StepLimits
from batchwright.step import EqualResults, EqualSteps


class Foresight:
    """Says how long nothing changes, and writes down that so much time has passed."""

    def __init__(
        self,
        books: Books,
        limits: StepLimits,
        closed_steps: ClosedSteps,
        forecast: Forecast,
        intake: Intake,
        stats: SchedulerStats,
    ) -> None:
        self._books = books
        self._limits = limits
        self._closed_steps = closed_steps
        self._forecast = forecast
        self._intake = intake
        self._stats = stats
        self._num_made = 0  # of the Steps said last, those in which the forecast makes its curve

    def look(self) -> EqualSteps | None:
        """The coming Steps that are equal, as far as it is known; None: perhaps none.

        No Step may be in flight.
        """
        books, state = self._books, self._books.slots
        slots = state.running
        if not 0 < len(slots) <= self._limits.max_tokens or not self._limits.are_full:
            return None
        positions = state.num_computed[slots]
        is_fed = (state.num_tokens[slots] == positions + 1) & (positions >= state.num_prompt[slots])
        if not is_fed.all() or state.watched[slots].any() or books.waiting.is_urgent:
            return None
        if any(table.writes_shared_block(slots, positions) for table in books.tables):
            return None  # samples part: blocks are copied, which a Step says and these do not
        num_steps = int((state.max_len[slots] - state.num_tokens[slots]).min())
        num_steps = self._with_room(slots, positions, num_steps)
        closed = self._closed(slots, positions, num_steps)
        if not closed.num_steps:
            return None
        self._num_made = closed.num_made
        return EqualSteps(books.builder.released, slots, positions, closed.num_steps)

    def take(self, steps: EqualSteps, results: EqualResults) -> Update:
        """Books as if some of these Steps had been made and their results taken in."""
        books, state = self._books, self._books.slots
        slots, starts, num_steps = steps.slots, steps.positions, results.num_steps
        assert 0 < num_steps <= steps.num_steps
        ends = starts + np.int32(num_steps)
        for group, table in enumerate(books.tables):
            if self._may_lack(table, slots, num_steps):
                need = _growth(table, slots, starts, num_steps)
                books.cache.evict(group, max(need - table.pool.num_free, 0))
            for first, last in _parts(num_steps, table):
                table.grow(slots, starts + first, starts + last)
                table.release_behind_window(slots, starts + last - np.int32(1))
            table.take_changes()  # who skips Steps keeps no block tables
        self._stats.work.add_rows(
            starts,
            ends,
            state.num_prompt[slots],
            state.computed_once[slots],
            [table.window for table in books.tables],
        )
        self._stats.work.num_rows += (num_steps - 1) * len(slots)  # a row counts in every Step
        self._stats.work.num_logits += num_steps * len(slots)
        self._stats.num_steps += num_steps
        self._stats.num_computed_tokens += num_steps * len(slots)
        books.builder.skip(num_steps)
        self._forecast.skip_steps(num_steps, self._num_made)
        state.num_computed[slots] = ends
        state.num_tokens[slots] += np.int32(num_steps)
        return self._intake.take_equal(slots, results.ordinary_ids, results.token_ids, num_steps)

    def _with_room(self, slots: Int32Array, starts: Int32Array, num_steps: int) -> int:
        """For how many Steps, up to `num_steps`, blocks suffice without preemption."""
        for group, table in enumerate(self._books.tables):
            if not self._may_lack(table, slots, num_steps):
                continue
            room = table.pool.num_free
            if self._can_evict:
                room += self._books.cache.num_evictable(group)

            def fits(steps: int, table: BlockTable = table, room: int = room) -> bool:
                return _growth(table, slots, starts, steps) <= room

            num_steps = most_steps(num_steps, fits)
        return num_steps

    def _may_lack(self, table: BlockTable, slots: Int32Array, num_steps: int) -> bool:
        """False: there are as many free blocks as any rows take in so many Steps."""
        touched = num_steps // table.block_size + 1  # blocks that one row is given, at most
        return len(slots) * touched > table.pool.num_free

    @property
    def _can_evict(self) -> bool:
        """Whether giving up cached blocks at once comes to the same as one by one.

        With several groups, a window that frees blocks between Steps, or segments, which are
        given up whole, it may not; and what goes to the host a Step must say.
        """
        books = self._books
        is_one = len(books.tables) == 1 and books.tables[0].window is None
        return is_one and not books.segments and not books.host

    def _closed(self, slots: Int32Array, starts: Int32Array, num_steps: int) -> Closed:
        """For how many of these Steps nothing starts."""
        if not num_steps:
            return Closed(0, 0)
        evicts_first = any(
            self._may_lack(table, slots, 1)
            and _growth(table, slots, starts, 1) > table.pool.num_free
            for table in self._books.tables
        )
        budget = self._limits.num_tokens(len(slots)) - len(slots)

        def growth(table: BlockTable, num_steps: int) -> int:
            return _growth(table, slots, starts, num_steps)

        return self._closed_steps.look(budget, num_steps, growth, may_ask_plan=not evicts_first)


def _parts(num_steps: int, table: BlockTable) -> Iterator[tuple[np.int32, np.int32]]:
    """Steps [first, last) that are taken together: a window gives blocks back in between."""
    length = num_steps if table.window is None else table.block_size
    for first in range(0, num_steps, length):
        yield np.int32(first), np.int32(min(first + length, num_steps))


def _growth(table: BlockTable, slots: Int32Array, starts: Int32Array, num_steps: int) -> int:
    """Blocks that these rows are given in so many Steps."""
    return int(table.num_blocks_to_grow(slots, starts, starts + np.int32(num_steps)).sum())
