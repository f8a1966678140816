"""DualScan: rows from both ends of an order, so that memory in use has the job's balance.

The left cursor is at the densest unit, the right one at the sparsest. KV memory is divided between
rows that came from the left and from the right such that their densities, weighted by memory, make
the density of the whole job: with M_L + M_R = M and M_L * rho_L + M_R * rho_R = M * rho. A row
that finds no room holds up its own side only: one that is to stay long must not keep out those that
come and go.

Memory says what is read in a Step, and not what is computed: a prompt that takes a whole Step
leaves none for those after it, and nothing to hide their reading. So prompts are spread evenly over
the Steps.

Where slots run out before memory does, as much memory is in use as the rows in the slots hold. The
sides keep their shares of that, each slot going to the side that lacks more of its share; and there
are more Steps over which prompts are spread.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from batchwright.plan.order import Order
from batchwright.request import Int32Array

TILE_TOKENS = 128
"""The limit of prompt tokens in a Step is a multiple of this."""


class MemorySplit(NamedTuple):
    """KV tokens for rows of either side."""

    left: float
    right: float


def split_memory(kv_tokens: float, left: float, right: float, mean: float) -> MemorySplit:
    """Divide memory between densities `left` >= `right` so that their mix has density `mean`."""
    if left - right < 1e-6 * max(left, 1e-6):
        return MemorySplit(kv_tokens / 2, kv_tokens / 2)
    share = min(max((mean - right) / (left - right), 0.0), 1.0)
    return MemorySplit(kv_tokens * share, kv_tokens * (1 - share))


class Pick(NamedTuple):
    """The row to start next, the side it comes from, and the KV it is expected to hold."""

    row: int
    is_left: bool
    kv_tokens: float


class DualScan:
    """Two cursors over an order with units; each takes the rows of a unit from its beginning.

    When they meet in a unit, the left one takes what is left of it.

    Attributes:
        prompt_tokens: of prompts, to be computed in a Step, that the whole job takes alike in all
            Steps if memory or slots are full all the time.

    Args:
        order: rows and their units, at least one row.
        kv_tokens: KV memory in tokens.
        num_slots: rows that run at once, at most.
    """

    def __init__(self, order: Order, kv_tokens: float, num_slots: float = math.inf) -> None:
        assert order.units is not None
        self._rows, self._units, self._kv_tokens = order.rows, order.units, kv_tokens
        held = min(kv_tokens, num_slots * order.units.kv_per_slot)
        tiles = math.ceil(order.units.prompt_share * held / TILE_TOKENS)
        self.prompt_tokens = TILE_TOKENS * max(tiles, 1)
        self._ends = np.cumsum(order.units.size)
        self._starts = self._ends - order.units.size
        self._left, self._right = 0, len(self._ends) - 1  # the units they are in
        self._left_line, self._right_line = 0, int(self._starts[-1])

    def pick(self, in_use: MemorySplit, but: Collection[bool] = ()) -> Pick | None:
        """The row to start next, which counts as taken; None: there is none, or none has room.

        Args:
            in_use: KV tokens expected of unfinished rows of either side. If it is nothing at all,
                a row is picked whatever its size.
            but: sides that no row is to come from, the left one being True. Once the cursors have
                met there is only one.
        """
        self._enter_units()
        if self.has_met and but:
            return None
        if self.has_met and self._left_line == self._ends[self._left]:
            return None
        left = Pick(*self._at(self._left_line, is_left=True))
        if self.has_met:
            self._left_line += 1
            return left
        right = Pick(*self._at(self._right_line, is_left=False))
        pick = self._side_with_room(left, right, in_use, but)
        if pick is left:
            self._left_line += 1
        elif pick is right:
            self._right_line += 1
        return pick

    @property
    def has_met(self) -> bool:
        """Whether both cursors are in the same unit: there is nothing left to balance."""
        return self._left == self._right

    def __len__(self) -> int:
        left = self._ends[self._left] - self._left_line
        if self._left == self._right:
            return int(left)
        between = self._starts[self._right] - self._ends[self._left]
        return int(left + between + self._ends[self._right] - self._right_line)

    def rest(self) -> Int32Array:
        """Rows not picked yet, as if the ends took turns."""
        left = np.arange(self._left_line, self._ends[self._left])
        if self._left < self._right:
            units = [
                np.arange(self._starts[unit], self._ends[unit])
                for unit in range(self._left + 1, self._right)
            ]
            right = np.arange(self._right_line, self._ends[self._right])
            from_left = np.concatenate((left, *units, right))
            from_right = np.concatenate((right, *reversed(units), left))
            left = np.column_stack((from_left, from_right)).ravel()
            _, first = np.unique(left, return_index=True)
            left = left[np.sort(first)]
        return self._rows[left]

    def _side_with_room(
        self, left: Pick, right: Pick, in_use: MemorySplit, but: Collection[bool]
    ) -> Pick | None:
        densest, sparsest = self._units.density[[self._left, self._right]].tolist()
        mean = self._units.mean_density
        split = split_memory(self._kv_tokens, densest, sparsest, mean)
        has_left = True not in but and in_use.left + left.kv_tokens <= split.left
        has_right = False not in but and in_use.right + right.kv_tokens <= split.right
        if has_left and has_right:  # the side that lacks more of its share
            return left if in_use.left * split.right <= in_use.right * split.left else right
        if has_left or has_right:
            return left if has_left else right
        if but or in_use.left + in_use.right > 0:
            return None
        return left if split.left >= split.right else right

    def _at(self, line: int, *, is_left: bool) -> tuple[int, bool, float]:
        return int(self._rows[line]), is_left, float(self._units.kv_tokens[line])

    def _enter_units(self) -> None:
        """Leave units that are used up, until both cursors have a row or have met."""
        while self._left < self._right and self._right_line == self._ends[self._right]:
            self._right -= 1
            self._right_line = int(self._starts[self._right])
        while self._left < self._right and self._left_line == self._ends[self._left]:
            self._left += 1
            is_met = self._left == self._right
            self._left_line = self._right_line if is_met else int(self._starts[self._left])
