"""Closed steps: for how many coming Steps nothing can start, so that admission need not be asked.

Whoever is next is settled by then: the first of these Steps would ask the plan, and what is refused
waits ahead of the plan; one row from each end if the order is started from both. So two things are
left that may change while running sequences draw a token each: the blocks that are free, and what
the forecast says.

What cannot be told exactly counts as open; then the next Step is made as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from batchwright.kv.block_table import BlockTable
from batchwright.kv.groups import blocks_per_sequence
from batchwright.request import Int32Array
from batchwright.sched.admission import Admission
from batchwright.sched.books import Books
from batchwright.sched.forecast import Forecast
from batchwright.sequence import Sequence

Growth = Callable[[BlockTable, int], int]
"""Blocks of a group that running sequences are given in so many Steps."""


class Closed(NamedTuple):
    """Steps in which nothing starts.

    Attributes:
        num_steps: at least so many.
        num_made: in so many of them, the first ones, the forecast makes its curve.
    """

    num_steps: int
    num_made: int


OPEN = Closed(0, 0)


class ClosedSteps:
    """Says how long admission stays closed."""

    def __init__(self, books: Books, admission: Admission, forecast: Forecast) -> None:
        self._books = books
        self._admission = admission
        self._forecast = forecast

    def look(self, budget: int, num_steps: int, growth: Growth, *, may_ask_plan: bool) -> Closed:
        """Up to `num_steps` of the coming Steps.

        Args:
            budget: tokens that running sequences leave in each of them.
            may_ask_plan: whether the first of them would ask the plan in the state it is in.
        """
        books, waiting, expected = self._books, self._books.waiting, self._books.expected
        if budget <= 0:
            return Closed(num_steps, 0)
        wants_lengths = self._forecast.is_made and expected.knows_any  # the first of these Steps
        if wants_lengths and expected.is_due:
            return OPEN
        if not self._admission.num_free_slots:
            return Closed(num_steps, 0)
        if books.segments:
            return OPEN  # they are given up whole
        limit, refused, closed = waiting.max_prompt_tokens, list[Sequence](), Closed(num_steps, 0)
        while closed.num_steps:
            if not may_ask_plan and not waiting.is_known:
                closed = OPEN
                break
            sequence = waiting.next(books.slots.num_running)
            if sequence is None:
                break
            refused.append(sequence)
            one = self._closed_to(sequence, budget, num_steps, growth, wants_lengths)
            num_steps = min(closed.num_steps, one.num_steps)
            closed = Closed(num_steps, min(max(closed.num_made, one.num_made), num_steps))
            if closed.num_steps and not waiting.refuse(sequence):
                break
        for sequence in refused:
            waiting.put_back(sequence)
        # What the plan says of budgets holds from the Step after the one that asked it.
        return closed if waiting.max_prompt_tokens == limit else OPEN

    def _closed_to(
        self,
        sequence: Sequence,
        budget: int,
        num_steps: int,
        growth: Growth,
        wants_lengths: bool,
    ) -> Closed:
        """How long a sequence, which is next, does not start."""
        expected, is_unasked = self._books.expected, sequence.expected_output is None
        if sequence.request.layout is not None or (wants_lengths and is_unasked):
            return OPEN  # an encoder may start
        closed = self._refused(sequence, budget, num_steps, growth)
        if closed.num_made and (expected.is_due or (is_unasked and expected.knows_any)):
            return Closed(1, 1)  # the next one knows that memory is short, and asks for lengths
        return closed

    def _refused(self, sequence: Sequence, budget: int, num_steps: int, growth: Growth) -> Closed:
        """How long a sequence, which is next, is refused."""
        admission, tables = self._admission, self._books.tables
        num_matched = admission.num_matched(sequence)
        shared = admission.shared_blocks(sequence, num_matched)
        num_asked = num_steps  # Steps in which its known tokens find blocks: the forecast is asked
        for group, table in enumerate(tables):
            if table.window is None:
                spare = self._num_spare(sequence, group, shared[group])
                num_asked = most_steps(num_asked, _within(spare, table, growth))
        if not num_asked:
            return Closed(num_steps, 0)
        for group, table in enumerate(tables):
            # Blocks are also given back behind a window, so it must be certain that there are some.
            if table.window is not None:
                lacking = admission.num_lacking(sequence, group, len(shared[group]))
                if lacking + self._most_growth(table, num_asked, growth) > 0:
                    return OPEN
        most = num_asked
        if len(tables) == 1 and tables[0].window is None:
            # Beyond this, evicting may take blocks that the sequence would take over.
            others = self._books.cache.num_evictable(0, but=self._books.waiting.returned_nodes())
            most = most_steps(most, _within(tables[0].pool.num_free + others, tables[0], growth))
        computed = admission.num_computed_at_once(sequence, num_matched, budget)
        num_held = admission.num_taken_over(sequence, num_matched)
        num_refused = self._forecast.num_refusals(sequence, computed, shared, num_held, most)
        if num_refused < num_asked:
            return Closed(num_refused, num_refused)
        return Closed(num_steps, num_asked)

    def _num_spare(self, sequence: Sequence, group: int, shared: Int32Array) -> int:
        """Blocks of a group that are not needed for the known tokens of a sequence."""
        lacking = self._admission.num_lacking(sequence, group, len(shared))
        return self._admission.num_to_evict(group, shared) - lacking

    def _most_growth(self, table: BlockTable, num_steps: int, growth: Growth) -> int:
        """Blocks that running sequences hold more after any of these Steps, at most."""
        in_a_window = blocks_per_sequence(table.window, 2**30, table.block_size, 1)
        return min(growth(table, num_steps), self._books.slots.num_running * in_a_window)


def most_steps(largest: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `largest` that fits, if all smaller ones do; 0 if 1 does not."""
    if largest < 1 or fits(largest):
        return max(largest, 0)
    low, high = 0, largest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _within(num_blocks: int, table: BlockTable, growth: Growth) -> Callable[[int], bool]:
    return lambda num_steps: growth(table, num_steps) <= num_blocks
