"""Progress: what running sequences compute in a Step.

Sequences that lack one token go first, then those that lack more, each in job order, within the
token budget. Where blocks are short the youngest goes back to waiting; the oldest never does.
"""

from __future__ import annotations

import numpy as np

from batchwright.request import Int32Array
from batchwright.sched.books import Books
from batchwright.sched.forecast import Forecast
from batchwright.sched.intake import Intake, SchedulerStats
from batchwright.sched.limits import StepLimits
from batchwright.sched.slots import Slots
from batchwright.sequence import Sequence


class Progress:
    """Divides the budget among slots and writes down what they compute."""

    def __init__(
        self,
        books: Books,
        limits: StepLimits,
        forecast: Forecast,
        intake: Intake,
        stats: SchedulerStats,
    ) -> None:
        self._books = books
        self._limits = limits
        self._forecast = forecast
        self._intake = intake
        self._stats = stats

    @property
    def num_free_slots(self) -> int:
        """Sequences that may still be started."""
        slots = self._books.slots
        return max(min(slots.num_free, self._limits.max_running - slots.num_running), 0)

    def advance_running(self) -> tuple[int, bool]:
        """Let all running sequences go on as far as budget and blocks allow.

        Returns:
            (tokens of the budget that are left, whether a sequence was preempted for that).
        """
        slots, preempted = self._books.slots, False
        while True:
            going, grants = self.divide(slots.running)
            self._release_behind_windows(going)
            if self.make_room(going, grants):
                break
            self._preempt(int(slots.running[-1]))
            preempted = True
        self.advance(going, grants)
        budget = self._limits.num_tokens(int(np.count_nonzero(grants == 1)))
        return budget - int(grants.sum()), preempted

    def make_way(self) -> None:
        """An urgent sequence waits and every slot is taken: the youngest other one waits again.

        At most one a Step, and never more than half of them, so that the others go on.
        """
        running = self._books.slots.running
        if self.num_free_slots or len(running) < 2 or not self._books.waiting.is_urgent:
            return
        middle = self._books.occupant(int(running[(len(running) - 1) // 2]))
        if not middle.request.urgent:  # urgent ones run first, so this one and all after it are not
            self._preempt(int(running[-1]))

    def divide(self, slots: Int32Array) -> tuple[Int32Array, Int32Array]:
        """Tokens each slot may compute now: single tokens first, then job order."""
        state = self._books.slots
        wanted = np.minimum(state.num_tokens[slots], state.compute_end[slots])
        wanted = wanted - state.num_computed[slots]
        # What may follow a token in flight is not known yet where a grammar decides it.
        wanted[state.constrained[slots] & (state.num_known[slots] < state.num_tokens[slots])] = 0
        slots, wanted = slots[wanted > 0], wanted[wanted > 0]
        singles_first = np.argsort(wanted > 1, kind="stable")
        slots, wanted = slots[singles_first], wanted[singles_first]
        before = np.cumsum(wanted) - wanted
        budget = self._limits.num_tokens(int(np.count_nonzero(wanted == 1)))
        grants = np.clip(budget - before, 0, wanted).astype(np.int32)
        return slots[grants > 0], grants[grants > 0]

    def make_room(self, slots: Int32Array, grants: Int32Array) -> bool:
        """Evict until the slots can grow. False: even that is not enough."""
        books = self._books
        starts, ends = self._write_range(slots, grants)
        for group, table in enumerate(books.tables):
            need = int(table.num_blocks_to_grow(slots, starts, ends).sum())
            if need > table.pool.num_free:
                books.evict(group, need - table.pool.num_free)
            if need > table.pool.num_free:
                assert books.slots.num_running > 1, "a sequence outgrew the pool"
                return False
        return True

    def advance(self, slots: Int32Array, grants: Int32Array, *, shared: bool = True) -> None:
        """Schedule the next `grants` tokens of each slot; the blocks are there.

        Args:
            shared: whether anyone else may want the blocks of their prompts.
        """
        if not len(slots):
            return
        books, state = self._books, self._books.slots
        starts, ends = self._write_range(slots, grants)
        for table in books.tables:
            table.grow(slots, starts, ends)
        computed = state.num_computed[slots]
        books.builder.add_rows(slots, computed, ends)
        state.num_computed[slots] = ends
        if shared:
            for slot, start, end in _inside_prompt(state, slots, computed, ends):
                books.keep_prefix(slot, start, end)
        sampled = slots[state.samples[slots] & (ends == state.num_tokens[slots])]
        state.num_tokens[sampled] += 1
        books.builder.add_samples(sampled)
        draws_first = state.num_tokens[sampled] == state.num_prompt[sampled] + 1
        for slot in sampled[draws_first].tolist():
            self._fork_siblings(slot)

    def book_start(self, sequence: Sequence, num_cached: int) -> None:
        """A sequence has started, with so many tokens taken from shared blocks."""
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            self._stats.num_cached_tokens += sequence.num_cached_tokens
        self._books.no_longer_waits(sequence)

    def _write_range(self, slots: Int32Array, grants: Int32Array) -> tuple[Int32Array, Int32Array]:
        """First position each slot will write, and the end of what it will compute."""
        state = self._books.slots
        computed = state.num_computed[slots]
        return np.maximum(computed, state.write_from[slots]), computed + grants

    def _fork_siblings(self, slot: int) -> None:
        """The prompt is computed: samples 1..n-1 share its blocks and draw from its logits.

        Siblings that find no slot, or no memory until they end, wait as sequences of their own
        and share the full blocks.
        """
        books = self._books
        parent = books.occupant(slot)
        siblings, parent.siblings = parent.siblings, []
        for sibling in siblings:
            if sibling.finish_reason is not None:
                continue
            computed = int(books.slots.num_computed[slot])
            if not self.num_free_slots or not self._has_room_to_fork(slot, sibling, computed):
                books.waiting.put_back(sibling)
                continue
            child = books.slots.occupy(sibling, computed, write_from=0)
            for table in books.tables:
                table.fork(slot, child)
            self.book_start(sibling, num_cached=computed)
            books.slots.num_tokens[child] += 1
            books.builder.add_fork(child, slot)
            self._forecast.holds(child)

    def _has_room_to_fork(self, slot: int, sibling: Sequence, computed: int) -> bool:
        """Whether a sibling fits until its expected end; if so the forecast counts it."""
        if self._forecast.surely_fits(sibling, num_spare=1):  # see is_first_fork
            return True
        self._forecast.make()
        self._forecast.holds(slot)
        num_full = computed // self._books.block_size
        shared = [table.table[slot, table.start[slot] : num_full] for table in self._books.tables]
        table = self._books.tables[0]
        unfinished = table.table[slot, min(num_full, int(table.end[slot]) - 1)]
        is_first = computed % self._books.block_size > 0 and table.pool.ref_counts[unfinished] == 1
        return self._forecast.reserve(
            sibling, computed, shared, num_full, is_first_fork=bool(is_first)
        )

    def _preempt(self, slot: int) -> None:
        """Send a slot back to waiting."""
        epoch = int(self._books.slots.epoch[slot])
        self._books.parking.park(slot)
        sequence = self._books.move_to_waiting(slot, keep_prefix=True)
        if sequence.num_in_flight:
            self._intake.expect_late(slot, epoch, sequence)
        self._stats.num_preemptions += 1

    def _release_behind_windows(self, slots: Int32Array) -> None:
        for table in self._books.tables:
            table.release_behind_window(slots, self._books.slots.num_computed[slots])


def _inside_prompt(
    state: Slots, slots: Int32Array, starts: Int32Array, ends: Int32Array
) -> list[tuple[int, int, int]]:
    """(slot, start, end) of slots that begin inside their prompt."""
    inside = starts < state.num_prompt[slots]
    columns = (slots[inside].tolist(), starts[inside].tolist(), ends[inside].tolist())
    return list(zip(*columns, strict=True))
