"""HostMemory: blocks that gave up their place on the device and are kept on the host. No tensors.

One KV group. A Step copies blocks out before it writes anything, and copies blocks in after its
block copies and before it computes; so a block may go out and its place be given away in one Step,
and what goes out in a Step may come in in the same one.
"""

from __future__ import annotations

import numpy as np

from batchwright.kv.blocks import BlockPool
from batchwright.request import Int32Array

NO_PAIRS: Int32Array = np.empty((0, 2), np.int32)


class HostMemory:
    """Says which host blocks are free, and collects the copies for the next Step.

    Args:
        num_blocks: that the host has room for; 0: nothing is ever kept.
        num_device_blocks: of the group's pool.

    Attributes:
        num_saved, num_loaded: blocks copied so far, to the host and back.
    """

    def __init__(self, num_blocks: int, num_device_blocks: int) -> None:
        self._pool = BlockPool(num_blocks)
        self._is_coming = np.zeros(num_device_blocks, np.bool_)
        self._saves: list[Int32Array] = []
        self._loads: list[Int32Array] = []
        self._left: list[Int32Array] = []  # free from the next Step on, when they have been read
        self.num_saved = self.num_loaded = 0

    def __bool__(self) -> bool:
        return self._pool.num_blocks > 0

    @property
    def num_blocks(self) -> int:
        """Blocks of the host, free or not."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be saved now."""
        return self._pool.num_free

    def is_coming(self, block_ids: Int32Array) -> np.ndarray:
        """[num blocks] bool: whether a block of the device is loaded by the next Step only, so that
        it cannot be saved by it."""
        return self._is_coming[block_ids]

    def save(self, block_ids: Int32Array) -> Int32Array:
        """Copy blocks of the device, as many as are free at most; returns the host's."""
        assert not self.is_coming(block_ids).any(), "a block would be saved before it is loaded"
        host_ids = self._pool.allocate(len(block_ids))
        self._saves.append(np.stack((block_ids, host_ids), axis=1))
        self.num_saved += len(block_ids)
        return host_ids

    def load(self, host_ids: Int32Array, block_ids: Int32Array) -> None:
        """Copy blocks back to others of the device; the host's become free."""
        self._loads.append(np.stack((host_ids, block_ids), axis=1))
        self._is_coming[block_ids] = True
        self._left.append(host_ids)
        self.num_loaded += len(block_ids)

    def forget(self, host_ids: Int32Array) -> None:
        """Nobody needs these any more."""
        if not len(host_ids):
            return
        saves = [pairs[~np.isin(pairs[:, 1], host_ids)] for pairs in self._saves]
        self.num_saved -= sum(map(len, self._saves)) - sum(map(len, saves))
        self._saves = saves
        self._pool.release(host_ids)

    def take_changes(self) -> tuple[Int32Array, Int32Array]:
        """([n, 2] block and host block to save, [n, 2] host block and block to load) for a Step."""
        saves = np.concatenate(self._saves) if self._saves else NO_PAIRS
        loads = np.concatenate(self._loads) if self._loads else NO_PAIRS
        self._saves, self._loads = [], []
        self._is_coming[:] = False
        if self._left:
            self._pool.release(np.concatenate(self._left))
            self._left = []
        return saves, loads

    def clear(self) -> None:
        """Nothing is kept, and no copy is made."""
        self._pool = BlockPool(self._pool.num_blocks)
        self._saves, self._loads, self._left = [], [], []
        self._is_coming[:] = False

    def check_integrity(self, held: Int32Array) -> None:
        """Compare with what holders say they keep: host block ids, one entry each."""
        self._pool.check_integrity(np.concatenate([held, *self._left]))
