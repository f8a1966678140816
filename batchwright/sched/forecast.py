"""Forecast: how much KV memory the running sequences will hold, step by step, until they end.

A sequence takes one token a Step and leaves at its expected length, so memory grows until one ends,
and its highest point is the moment before some sequence ends. With c tokens now and r to come, that
is the maximum over j of the sum over all i with r_i >= r_j of blocks(c_i + r_j). A sequence is
started only if that maximum still fits: then, as long as no sequence outgrows its expected length,
none is ever preempted. A block that several hold counts once, until the last of them leaves.

Where a Step may do more or less than one token (a prompt in chunks, a result that comes late) the
forecast takes the faster growth and the later end, so it is never too low.

The curve is made once per Step, when a bound that costs nothing does not already say that all fits.
A Step that was looked at before, in vain, takes the curve of the look.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.kv.block_table import BlockTable
from batchwright.request import Int32Array
from batchwright.sched.curve import Curve
from batchwright.sched.limits import StepLimits
from batchwright.sched.slots import Slots
from batchwright.sequence import Sequence


class Forecast:
    """Blocks in use at every Step to come, counted from the one that is being scheduled.

    Args:
        slots, tables: the running sequences and their blocks.
        limits: the token budget, which tells how many Steps a long prompt takes.

    Attributes:
        num_late: Steps by which results come late, 0 or 1.
        was_needed: the curve was made for the last Step: memory is what limits the batch.
    """

    def __init__(self, slots: Slots, tables: Seq[BlockTable], limits: StepLimits) -> None:
        self._slots, self._limits = slots, limits
        self._curves = [Curve(table, slots) for table in tables]
        self.num_late = 1  # until it is known whether results come late
        self._has_begun = self._was_late = False
        self.was_needed = False
        self.is_made = False
        self._bound: list[int] | None = None  # blocks of each group if nothing were shared
        self._looked: _Look | None = None  # the curves are of before a Step, and for these rows

    def begin_step(self, *, is_late: bool) -> None:
        """The next Step is scheduled: what was known of the last one is out of date.

        Args:
            is_late: a Step is out whose result is not there yet.
        """
        self._was_late |= is_late
        self.num_late = int(self._was_late or not self._has_begun)
        self._has_begun = True
        self.was_needed, self.is_made, self._bound = self.is_made, False, None

    def surely_fits(self, sequence: Sequence, num_spare: int = 0) -> bool:
        """Whether all that runs and this sequence fit at their expected ends, sharing nothing.

        If so it counts as started.

        Args:
            num_spare: blocks that must be left.
        """
        if self.is_made:
            return False
        if self._bound is None:
            self._expect_more_of_the_outgrown()
            self._bound = self._blocks_at_ends()
        needs = self._with_one_more(self._bound, sequence)
        if any(n + num_spare > g.num_blocks for n, g in zip(needs, self._curves, strict=True)):
            return False
        self._bound = needs
        return True

    def _blocks_at_ends(self) -> list[int]:
        """Blocks of each group that running sequences hold at their ends, if nothing is shared."""
        ends = self._slots.expected_len[self._slots.running]
        return [group.blocks_at_end(ends, self._limits) for group in self._curves]

    def _with_one_more(self, blocks: list[int], sequence: Sequence) -> list[int]:
        """The same with one sequence more."""
        end = max(sequence.expected_len, len(sequence.token_ids))
        return [
            num + group.blocks_of_one(end, self._limits)
            for num, group in zip(blocks, self._curves, strict=True)
        ]

    def make(self) -> None:
        """Make the curve of what runs; the tokens of this Step are scheduled, blocks and all."""
        if self.is_made:
            return
        self._expect_more_of_the_outgrown()
        if self._looked is not None and self._looked.is_one_step_before(self._look()):
            for group in self._curves:
                group.go_on()
        else:
            self._make_curves()
        self._looked = None
        self.is_made = True

    def _look(self) -> _Look:
        slots = self._slots
        running = slots.running
        return _Look(running, slots.num_tokens[running], slots.expected_len[running], self.num_late)

    def _make_curves(self) -> None:
        slots = self._slots
        running = slots.running
        num_lacking = self._num_lacking(running)
        ends = self._ends(
            slots.num_tokens[running],
            slots.expected_len[running],
            num_lacking,
            slots.constrained[running],
        )
        by_end = np.argsort(ends, kind="stable")
        running, ends = running[by_end], ends[by_end]
        last = np.maximum(
            slots.expected_len[running] - 1 + self.num_late, slots.num_tokens[running]
        )
        last = np.minimum(last, slots.compute_end[running])
        is_prompt = (num_lacking > 0)[by_end]
        for group in self._curves:
            group.make(running, ends, last, is_prompt, self._limits)

    def reserve(
        self,
        sequence: Sequence,
        num_computed: int,
        shared: Seq[Int32Array],
        num_held: int,
        *,
        is_first_fork: bool = False,
    ) -> bool:
        """Start a sequence if it fits to its expected end, which then counts as started.

        Args:
            num_computed: its tokens whose KV is there or scheduled once this Step is.
            shared: per KV group the blocks that it takes over from others.
            num_held: the index of the first block that it does not take over.
            is_first_fork: it shares an unfinished block with one other, and both will copy it.
        """
        self.make()
        steps = self._own_blocks(sequence, num_computed, shared, num_held)
        if is_first_fork:  # until both have their copies, what they copy from is there too
            for own in steps:
                own[1:2] += 1
        if not all(group.fits(own) for group, own in zip(self._curves, steps, strict=True)):
            return False
        for group, own in zip(self._curves, steps, strict=True):
            group.add(own)
        return True

    def _own_blocks(
        self,
        sequence: Sequence,
        num_computed: int,
        shared: Seq[Int32Array],
        num_held: int,
    ) -> list[Int32Array]:
        """What a sequence would add to the curve of each group; arguments as those of `reserve`."""
        wanted = min(len(sequence.token_ids), sequence.compute_end)
        num_lacking = np.array([wanted - num_computed])
        draws = sequence.samples and num_computed >= wanted
        num_tokens = np.array([len(sequence.token_ids) + draws], np.int32)
        num_lacking -= sequence.samples and not draws
        expected = np.array([max(sequence.expected_len, int(num_tokens[0]))], np.int32)
        end = int(
            self._ends(num_tokens, expected, num_lacking, np.array([sequence.is_constrained]))[0]
        )
        last = min(int(expected[0]) - 1 + self.num_late, sequence.compute_end)
        last = max(last, wanted)
        first = int(num_tokens[0]) - 1 if sequence.samples else wanted
        return [
            group.steps(first, end, last, num_held, blocks, num_computed, self._limits)
            for group, blocks in zip(self._curves, shared, strict=True)
        ]

    # Between Steps ----------------------------------------------------------------------------

    def num_refusals(
        self,
        sequence: Sequence,
        num_computed: int,
        shared: Seq[Int32Array],
        num_held: int,
        num_steps: int,
    ) -> int:
        """In how many coming Steps it is certain that a sequence is refused, one after the other.

        To be asked when no result is out, while running sequences only draw a token each, write to
        blocks of their own, and the first of these Steps asks the forecast in any case. The curve
        is then the same in all of them, each being one Step further along, until a sequence reaches
        its expected end. That is not so where blocks are left behind a window, so groups with
        windows are taken to refuse nobody.

        Args:
            num_computed, shared, num_held: see `reserve`.
            num_steps: Steps that are asked about.
        """
        slots = self._slots
        self.num_late = int(self._was_late)
        self._expect_more_of_the_outgrown()
        running = slots.running
        if self.num_late and slots.constrained[running].any():
            return 0  # a token of theirs takes two Steps
        needs = self._with_one_more(self._blocks_at_ends(), sequence)
        if all(need <= group.num_blocks for need, group in zip(needs, self._curves, strict=True)):
            return 0
        until_change = int((slots.expected_len[running] - slots.num_known[running]).min())
        num_steps = min(num_steps, until_change)
        self._make_curves()
        if all(group.goes_on for group in self._curves):
            self._looked = self._look()
        alone = [np.empty(0, np.int32)] * len(self._curves)
        own = self._own_blocks(sequence, num_computed, alone, num_held)
        return first_where_all(
            num_steps,
            lambda first, end: [
                group.fits_later(blocks, taken, first + 1, end + 1)
                for group, blocks, taken in zip(self._curves, own, shared, strict=True)
            ],
        )

    def skip_steps(self, num_steps: int, num_made: int) -> None:
        """As after so many Steps, at least one, of which the first `num_made` made the curve."""
        self._looked = None
        was_made = self.is_made if num_steps == 1 else num_made >= num_steps - 1
        self.begin_step(is_late=False)
        self.was_needed, self.is_made = was_made, num_made >= num_steps

    def holds(self, slot: int) -> None:
        """A slot got blocks since the curve was made: others may take them over."""
        if not self.is_made:
            return
        slots, which = self._slots, np.array([slot])
        end = self._ends(
            slots.num_tokens[which],
            slots.expected_len[which],
            self._num_lacking(which),
            slots.constrained[which],
        )
        for group in self._curves:
            group.hold(slot, int(end[0]))

    def _num_lacking(self, which: np.ndarray) -> np.ndarray:
        """Tokens of each slot that are left to compute before it draws one, or ends; a token that
        was just drawn is computed in the next Step in any case."""
        slots = self._slots
        wanted = np.minimum(slots.num_tokens[which], slots.compute_end[which])
        num_lacking: np.ndarray = wanted - slots.num_computed[which] - slots.samples[which]
        return num_lacking

    def _ends(
        self,
        num_tokens: Int32Array,
        expected: Int32Array,
        num_lacking: np.ndarray,
        is_constrained: np.ndarray,
    ) -> np.ndarray:
        """The Step in which each sequence holds nothing any more; the present one is 0."""
        left = np.maximum(expected - num_tokens, 0)
        left = np.where(is_constrained, left * (1 + self.num_late), left)
        num_running = self._slots.num_running
        per_step = max(self._limits.num_tokens(num_running) - num_running, 1)
        num_prompt_steps = -(-np.maximum(num_lacking, 0) // per_step)
        return left + num_prompt_steps + 1 + self.num_late

    def _expect_more_of_the_outgrown(self) -> None:
        """Sequences that go on past their expected end are expected to become twice as long."""
        slots = self._slots
        running = slots.running
        outgrown = slots.num_known[running] >= slots.expected_len[running]
        outgrown &= slots.expected_len[running] < slots.max_len[running]
        if outgrown.any():
            which = running[outgrown]
            num_prompt = slots.num_prompt[which]
            doubled = num_prompt + 2 * (slots.num_known[which] - num_prompt)
            slots.expected_len[which] = np.minimum(doubled, slots.max_len[which])


class _Look(NamedTuple):
    """What the curves of a look between Steps are made from, or those of the Step after it.

    In between every running sequence draws one token; `num_refusals` says why that changes nothing.
    """

    running: Int32Array
    num_tokens: Int32Array
    expected_len: Int32Array
    num_late: int

    def is_one_step_before(self, other: _Look) -> bool:
        return (
            self.num_late == other.num_late
            and np.array_equal(self.running, other.running)
            and np.array_equal(self.num_tokens + 1, other.num_tokens)
            and np.array_equal(self.expected_len, other.expected_len)
        )


def first_where_all(num: int, conditions: Callable[[int, int], list[npt.NDArray[np.bool_]]]) -> int:
    """The first number below `num` for which all conditions hold; `num` if there is none.

    Args:
        conditions: of all numbers from `first` to `end - 1`, as arrays.
    """
    first, end = 0, min(num, 16)
    while first < end:
        found = np.flatnonzero(np.all(conditions(first, end), axis=0))
        if len(found):
            return first + int(found[0])
        first, end = end, min(num, end + 64)
    return num
