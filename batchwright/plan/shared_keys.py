"""StepCosts: what Steps cost when rows share keys, which is followed from Step to Step.

A Step carries changes of block tables only, so the tables are kept here, and how many rows use each
block; what is asked for changes with the few blocks that a Step adds or gives back. All rows that
hold a block are taken to read all of it in each Step, which is so while they decode.
"""

from __future__ import annotations

import numpy as np

from batchwright.plan.cost import CostModel, Int64Array, SharedReads
from batchwright.request import Int32Array
from batchwright.step import EqualSteps, Step

NOTHING_SHARED = SharedReads(0, 0)


class SharedKeys:
    """Follows one KV group.

    Args:
        block_size: tokens of a block.
        rows_per_load: rows that use a key while it is loaded; 1: every row loads its own.
    """

    def __init__(self, block_size: int, rows_per_load: int) -> None:
        self._block_size, self._rows_per_load = block_size, rows_per_load
        self._tables: dict[int, dict[int, int]] = {}  # slot -> index -> block
        self._num_users: Int64Array = np.zeros(0, np.int64)
        self._num_reads = self._num_loads = 0  # in blocks

    def follow(self, step: Step, group: int) -> SharedReads:
        """Take in the changes of a Step, and tell what is shared in it."""
        if self._rows_per_load == 1:
            return NOTHING_SHARED
        self.release(step.finished_slots)
        slots, indices, blocks = (column.tolist() for column in step.table_updates[group])
        added, replaced = [], []
        for slot, index, block in zip(slots, indices, blocks, strict=True):
            table = self._tables.setdefault(slot, {})
            if index in table:
                replaced.append(table[index])
            table[index] = block
            added.append(block)
        self._change(replaced, -1)
        self._change(added, 1)
        return self._shared_reads()

    def release(self, slots: Int32Array) -> SharedReads:
        """These slots gave their blocks back; returns what is shared then."""
        if self._rows_per_load == 1:
            return NOTHING_SHARED
        gone = [block for slot in slots.tolist() for block in self._tables.pop(slot, {}).values()]
        self._change(gone, -1)
        return self._shared_reads()

    def _shared_reads(self) -> SharedReads:
        return SharedReads(self._num_reads * self._block_size, self._num_loads * self._block_size)

    def _change(self, blocks: list[int], change: int) -> None:
        if not blocks:
            return
        ids, counts = np.unique(np.array(blocks, np.int64), return_counts=True)
        if ids[-1] >= len(self._num_users):
            missing = 2 * int(ids[-1]) + 1 - len(self._num_users)
            self._num_users = np.pad(self._num_users, (0, missing))
        before = self._num_users[ids]
        after = before + change * counts
        self._num_users[ids] = after
        self._num_reads += int((_shared(after) - _shared(before)).sum())
        self._num_loads += int((self._loads(after) - self._loads(before)).sum())

    def _loads(self, num_users: Int64Array) -> Int64Array:
        return -(-_shared(num_users) // self._rows_per_load)


def _shared(num_users: Int64Array) -> Int64Array:
    """Users of each block that has more than one, else 0."""
    return np.where(num_users > 1, num_users, 0)


class StepCosts:
    """What Steps cost, one after another from the first, with what their rows share.

    Args:
        cost: charges a Step.
        block_size: tokens of a block.
    """

    def __init__(self, cost: CostModel, block_size: int) -> None:
        self._cost = cost
        self._groups = [  # attention with a window loads every row's keys for itself
            SharedKeys(block_size, cost.rows_per_load if attention.window is None else 1)
            for attention in cost.shape.attention
        ]

    def seconds(self, step: Step) -> float:
        """Time of the next Step; what `SimExecutor` asks."""
        return self._cost.seconds(step, self.follow(step))

    def equal_seconds(self, steps: EqualSteps) -> float:
        """Time of the next Steps, which are equal."""
        return self._cost.equal_seconds(steps, self.follow_equal(steps))

    def follow(self, step: Step) -> list[SharedReads]:
        """What the rows of the next Step share, by KV group."""
        return [keys.follow(step, group) for group, keys in enumerate(self._groups)]

    def follow_equal(self, steps: EqualSteps) -> list[SharedReads]:
        """The same of the next Steps; blocks that rows are given in them are theirs alone."""
        return [keys.release(steps.finished_slots) for keys in self._groups]
