"""Curve: blocks of one KV group that the running sequences will hold, Step by Step.

Made from where each sequence is and will end, all at once; then sequences that start are added.
`forecast.py` says what it is for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from batchwright.kv.block_table import BlockTable, ragged_ranges
from batchwright.kv.groups import blocks_per_sequence
from batchwright.request import Int32Array
from batchwright.sched.limits import StepLimits
from batchwright.sched.slots import Slots


class Curve:
    """The curve of one KV group: blocks in use by Step, the present one being 0.

    Args:
        table: the group's blocks.
    """

    def __init__(self, table: BlockTable, slots: Slots) -> None:
        self._table, self._slots = table, slots
        self._block_size = table.block_size
        self.num_blocks = table.pool.num_blocks
        most = slots.token_ids.shape[1] + 2
        self._blocks_of = -(-np.arange(4 * most, dtype=np.int32) // table.block_size)
        self._curve: Int32Array = np.zeros(1, np.int32)
        self._released_at: Int32Array = np.zeros(self.num_blocks, np.int32)  # 0: nobody runs on it
        self._mark: Int32Array = np.zeros(self.num_blocks, np.int32)

    @property
    def goes_on(self) -> bool:
        """Whether the curve of the next Step is the rest of this one: nothing is left behind."""
        return self._table.window is None

    def go_on(self) -> None:
        """Make the curve that of the next Step. Blocks that it takes are nobody else's."""
        self._curve = self._curve[1:] if len(self._curve) > 1 else np.zeros(1, np.int32)
        self._released_at = np.maximum(self._released_at - np.int32(1), 0)

    def blocks_at_end(self, ends: Int32Array, limits: StepLimits) -> int:
        """Blocks of sequences of these lengths that share nothing."""
        blocks = self._blocks_of[ends]
        return int(np.minimum(blocks, self._most(True, limits)).sum())

    def blocks_of_one(self, end: int, limits: StepLimits) -> int:
        """The same for one sequence."""
        return min(-(-end // self._block_size), self._most(True, limits))

    def _most(self, is_prompt: bool, limits: StepLimits) -> int:
        """Blocks that one sequence holds at most: behind a window it gives some up."""
        if self._table.window is None:
            return 2**30
        chunk = limits.max_tokens if is_prompt else 1
        return blocks_per_sequence(self._table.window, 2**30, self._block_size, chunk)

    def make(
        self,
        running: Int32Array,
        ends: np.ndarray,
        last: np.ndarray,
        is_prompt: np.ndarray,
        limits: StepLimits,
    ) -> None:
        """The curve of these slots, those that end first first.

        Args:
            last: tokens whose KV each has in the end.
        """
        table, slots = self._table, self._slots
        held = table.end[running] - table.start[running]
        lines_of_rows = np.repeat(np.arange(len(running), dtype=np.int32), held)
        rows, indices = ragged_ranges(running, table.start[running], held)
        blocks = table.table[rows, indices]
        ends_of_blocks = np.repeat(ends, held)
        lines = np.arange(len(blocks), dtype=np.int32)
        self._released_at[:] = 0
        self._released_at[blocks] = ends_of_blocks  # of several holders the last one stays
        self._mark[blocks] = lines
        is_last_holder = self._mark[blocks] == lines
        growth = np.maximum(self._blocks_of[last] - table.end[running], 0)
        if table.window is not None:
            most = np.where(is_prompt, self._most(True, limits), self._most(False, limits))
            # Rows that share blocks leave them behind at different times: nothing counts as shared.
            is_own = np.bincount(blocks, minlength=self.num_blocks)[blocks] == 1
            own = np.bincount(lines_of_rows[is_own], minlength=len(running))
            growth = np.minimum(growth, np.maximum(most - own, 0))
        computed = slots.num_computed[running]
        copies = table.num_blocks_to_grow(running, computed, computed + 1)
        copies -= np.maximum(self._blocks_of[computed + 1] - table.end[running], 0)
        copies = np.where(computed < slots.compute_end[running], copies, 0)
        _, number = ragged_ranges(running, np.zeros_like(growth), growth)
        first = table.end[running] * self._block_size + 2 - slots.num_tokens[running]
        times = np.repeat(first, growth) + number * self._block_size
        times = np.clip(times, 1, np.repeat(ends, growth))
        width = int(ends[-1]) + 1 if len(ends) else 1
        changes = np.bincount(times, minlength=width)
        changes -= np.bincount(ends_of_blocks[is_last_holder], minlength=width)
        changes -= np.bincount(ends, growth + copies, minlength=width).astype(np.int64)
        changes[0] += np.count_nonzero(is_last_holder)
        if width > 1:
            changes[1] += copies.sum()
        self._curve = np.cumsum(changes).astype(np.int32)

    def steps(
        self,
        first: int,
        end: int,
        last: int,
        num_held: int,
        shared: Int32Array,
        num_computed: int,
        limits: StepLimits,
    ) -> Int32Array:
        """[end] blocks that a sequence adds to the curve.

        Args:
            first: tokens whose KV it has in this Step and, one more each, in those after it.
            last: the same in the end, at most.
        """
        own = self._blocks_of[first : first + end] - np.int32(num_held)
        own = np.minimum(own, int(self._blocks_of[last]) - num_held)
        own[0] = min(int(own[0]), max(int(self._blocks_of[num_computed]) - num_held, 0))
        if self._table.window is not None:
            return np.minimum(own + len(shared), self._most(True, limits))
        if len(shared):
            released_at = np.minimum(self._released_at[shared], end)
            own = own + np.cumsum(np.bincount(released_at, minlength=end + 1))[:end]
        return own

    def fits(self, own: Int32Array) -> bool:
        """Whether a sequence with these blocks fits beside the others."""
        both = min(len(own), len(self._curve))
        most = int((own[:both] + self._curve[:both]).max())
        if both < len(own):
            most = max(most, int(own[both:].max()))
        return most <= self.num_blocks

    def fits_later(
        self, own: Int32Array, shared: Int32Array, first: int, end: int
    ) -> npt.NDArray[np.bool_]:
        """[end - first] bool: whether a sequence fits if it starts so many Steps after the curve's.

        Args:
            own: blocks that it adds, without those that it takes over from others.
            shared: these; each counts as its own when the others have left it.
        """
        if self._table.window is not None:
            return np.ones(end - first, np.bool_)
        length = max(len(self._curve), end) + len(own)
        taken = np.bincount(np.minimum(self._released_at[shared], length), minlength=length)
        others = np.cumsum(taken[:length])
        others[: len(self._curve)] += self._curve
        later = sliding_window_view(others[first : end + len(own) - 1], len(own))
        fits: npt.NDArray[np.bool_] = (later + own).max(axis=1) <= self.num_blocks
        return fits

    def add(self, own: Int32Array) -> None:
        """Count a sequence as started."""
        missing = len(own) - len(self._curve)
        if missing > 0:
            self._curve = np.pad(self._curve, (0, missing))
        self._curve[: len(own)] += own.astype(np.int32)

    def hold(self, slot: int, end: int) -> None:
        """A slot's blocks stay until it ends, in Step `end`."""
        table = self._table
        blocks = table.table[slot, table.start[slot] : table.end[slot]]
        self._released_at[blocks] = np.maximum(self._released_at[blocks], end)
