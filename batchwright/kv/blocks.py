"""BlockPool: block ids, reference counts and the free list of one KV group. No tensors."""

from __future__ import annotations

import numpy as np

from batchwright.request import Int32Array


class BlockPool:
    """Hands out block ids and counts who holds them.

    A block is free exactly when its reference count is zero:
    num_free + number of blocks with a count above zero == num_blocks.

    Attributes:
        least_free: the fewest that were ever free.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts: Int32Array = np.zeros(num_blocks, np.int32)
        # A stack with the low ids on top: memory touched once is used again first.
        self._free: Int32Array = np.arange(num_blocks, dtype=np.int32)[::-1].copy()
        self.num_free = self.least_free = num_blocks

    def allocate(self, num: int) -> Int32Array:
        """Take `num` free blocks, each with one reference. The caller has checked `num_free`."""
        assert 0 <= num <= self.num_free, f"asked for {num} blocks of {self.num_free} free"
        ids = self._free[self.num_free - num : self.num_free][::-1].copy()
        self.num_free -= num
        self.least_free = min(self.least_free, self.num_free)
        self.ref_counts[ids] = 1
        return ids

    def share(self, ids: Int32Array) -> None:
        """Add one reference per entry; an id may occur more than once."""
        assert (self.ref_counts[ids] > 0).all(), "a free block cannot be shared"
        np.add.at(self.ref_counts, ids, 1)

    def release(self, ids: Int32Array) -> None:
        """Drop one reference per entry; blocks left without any become free."""
        np.subtract.at(self.ref_counts, ids, 1)
        assert (self.ref_counts[ids] >= 0).all(), "a block was released more often than held"
        freed = np.unique(ids[self.ref_counts[ids] == 0])
        self._free[self.num_free : self.num_free + len(freed)] = freed[::-1]
        self.num_free += len(freed)

    def check_integrity(self, held: Int32Array) -> None:
        """Compare with the references that holders say they have.

        Args:
            held: every reference of every holder, one entry each.
        """
        counts = np.bincount(held, minlength=self.num_blocks)
        assert (counts == self.ref_counts).all(), "reference counts differ from the holders' view"
        free = self._free[: self.num_free]
        assert len(np.unique(free)) == self.num_free, "a block is free twice"
        assert (self.ref_counts[free] == 0).all(), "a held block is in the free list"
        assert self.num_free + np.count_nonzero(self.ref_counts) == self.num_blocks, "blocks leaked"
