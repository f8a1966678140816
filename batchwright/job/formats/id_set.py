"""A set of ids that takes at most 32 bytes per id, however long they are.

Only 128-bit hashes are kept, so two different ids could be taken for the same: among n ids with
probability n^2 / 2^128 (127 bits are compared), 3e-27 for a million and 3e-21 for a billion.

The hashes lie in open-addressing tables. There are many small ones instead of one, so that growing
copies little at a time and never doubles the whole.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from struct import unpack

import numpy as np

_NUM_TABLES = 64
_FIRST_SLOTS = 64


class IdSet:
    """Strings that were added; there is no way to list them."""

    def __init__(self) -> None:
        # A slot is two numbers: the halves of a hash. The first is odd in slots that are taken.
        self._tables = [_empty(_FIRST_SLOTS) for _ in range(_NUM_TABLES)]
        self._num_used = [0] * _NUM_TABLES

    def __len__(self) -> int:
        return sum(self._num_used)

    @property
    def num_bytes(self) -> int:
        """Memory of the tables."""
        return sum(len(table) * table.itemsize for table in self._tables)

    def add(self, name: str) -> bool:
        """Add a string; returns whether it is new."""
        digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        low, high = unpack("<QQ", digest)
        number = high % _NUM_TABLES
        table = self._tables[number]
        if not _insert(table, low | 1, high):
            return False
        self._num_used[number] += 1
        if 8 * self._num_used[number] > 3 * len(table):  # three quarters of the slots
            self._tables[number] = _grown(table)
        return True


def _empty(num_slots: int) -> array[int]:
    return array("Q", bytes(16 * num_slots))


def _insert(table: array[int], low: int, high: int) -> bool:
    """Put a hash into the first free slot from its own on; False if it is there already."""
    size = len(table)
    slot = low % size & -2
    while found := table[slot]:
        if found == low and table[slot + 1] == high:
            return False
        slot += 2
        if slot == size:
            slot = 0
    table[slot] = low
    table[slot + 1] = high
    return True


def _grown(table: array[int]) -> array[int]:
    """A copy with half as many slots more.

    In the order of their own slots, hash i goes to max(its own, the slot after that of hash i - 1):
    a running maximum. Those that run over the end begin again at the start, one by one.
    """
    hashes = np.frombuffer(table, np.uint64).reshape(-1, 2)
    hashes = hashes[hashes[:, 0] > 0]
    larger = _empty(3 * len(table) // 4)
    own = (hashes[:, 0] % np.uint64(len(larger)) >> np.uint64(1)).astype(np.int64)
    order = np.argsort(own)
    index = np.arange(len(order))
    slots = np.maximum.accumulate(own[order] - index) + index
    hashes, num_slots = hashes[order], len(larger) // 2
    fits = slots < num_slots
    np.frombuffer(larger, np.uint64).reshape(-1, 2)[slots[fits]] = hashes[fits]
    for low, high in hashes[~fits].tolist():
        _insert(larger, low, high)
    return larger
