"""BlockTable: which blocks every slot holds in one KV group, and how they grow, fork and die.

Slot s holds blocks [start[s], end[s]) of its sequence, by position: entry i covers tokens
[i * block_size, (i + 1) * block_size). `start` moves only in a windowed group. Each held entry is
one reference in the pool. Changes since the last Step are collected for the executor.
"""

from __future__ import annotations

import numpy as np

from batchwright.kv.blocks import BlockPool
from batchwright.kv.groups import KVGroup
from batchwright.request import Int32Array
from batchwright.step import TableUpdate


class BlockTable:
    """Block tables of all slots of one KV group, and the pool behind them."""

    def __init__(
        self, group: KVGroup, *, block_size: int, max_num_seqs: int, max_model_len: int
    ) -> None:
        self.window = group.window
        self.block_size = block_size
        self.pool = BlockPool(group.num_blocks)
        max_blocks = -(-max_model_len // block_size)
        self.table: Int32Array = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.start: Int32Array = np.zeros(max_num_seqs, np.int32)
        self.end: Int32Array = np.zeros(max_num_seqs, np.int32)
        self._updates: list[TableUpdate] = []
        self._copies: list[Int32Array] = []

    def num_blocks_to_grow(
        self, slots: Int32Array, write_starts: Int32Array, ends: Int32Array
    ) -> Int32Array:
        """Blocks each slot must be given before tokens [write_start, end) can be written.

        Counts new blocks and copies of shared ones: a write goes to a block of its own.
        """
        growth = np.maximum(-(-ends // self.block_size) - self.end[slots], 0)
        return growth + self._writes_shared_block(slots, write_starts, ends)

    def grow(self, slots: Int32Array, write_starts: Int32Array, ends: Int32Array) -> None:
        """Give the blocks that `num_blocks_to_grow` counted; shared ones are copied on write."""
        shared = self._writes_shared_block(slots, write_starts, ends)
        if shared.any():
            self._copy_on_write(slots[shared], write_starts[shared] // self.block_size)
        growth = np.maximum(-(-ends // self.block_size) - self.end[slots], 0)
        growing = growth > 0
        if growing.any():
            self._set(*ragged_ranges(slots[growing], self.end[slots[growing]], growth[growing]))
            self.end[slots[growing]] += growth[growing]

    def writes_shared_block(self, slots: Int32Array, write_starts: Int32Array) -> bool:
        """Whether any of these slots will copy the block that its next token falls into."""
        ends = write_starts + np.int32(1)
        return bool(self._writes_shared_block(slots, write_starts, ends).any())

    def adopt(self, slot: int, start: int, block_ids: Int32Array) -> None:
        """Let an empty slot hold shared blocks as its entries [start, start + len)."""
        self.pool.share(block_ids)
        self.hold(slot, start, block_ids)

    def hold(self, slot: int, start: int, block_ids: Int32Array) -> None:
        """The same with blocks of which one reference each is the slot's already."""
        self.start[slot], self.end[slot] = start, start + len(block_ids)
        indices = np.arange(start, start + len(block_ids), dtype=np.int32)
        self._write(np.full(len(indices), slot, np.int32), indices, block_ids)

    def fork(self, parent: int, child: int) -> None:
        """Let an empty slot share everything another slot holds."""
        start, end = int(self.start[parent]), int(self.end[parent])
        self.adopt(child, start, self.table[parent, start:end].copy())

    def release(self, *slots: int) -> None:
        """Drop all references of these slots."""
        held = [self.table[slot, self.start[slot] : self.end[slot]] for slot in slots]
        self.pool.release(np.concatenate(held) if len(held) > 1 else held[0])
        for slot in slots:
            self.start[slot] = self.end[slot] = 0

    def release_behind_window(self, slots: Int32Array, positions: Int32Array) -> None:
        """Drop blocks that no query at or after `positions` can see."""
        if self.window is None:
            return
        first = np.maximum(positions - self.window + 1, 0) // self.block_size
        first = np.minimum(first, self.end[slots])
        passed = first > self.start[slots]
        if passed.any():
            slots, first = slots[passed], first[passed]
            rows, indices = ragged_ranges(slots, self.start[slots], first - self.start[slots])
            self.pool.release(self.table[rows, indices])
            self.start[slots] = first

    def kv_slots(self, slots: Int32Array, positions: Int32Array) -> Int32Array:
        """Where the KV of token (slot, position) lies: block id * block_size + offset."""
        blocks = self.table[slots, positions // self.block_size]
        return blocks * np.int32(self.block_size) + positions % np.int32(self.block_size)

    def take_changes(self) -> tuple[TableUpdate, Int32Array]:
        """Table entries and block copies since the last call, for the next Step."""
        updates, copies = self._updates, self._copies
        self._updates, self._copies = [], []
        if not updates:
            empty = np.empty(0, np.int32)
            return TableUpdate(empty, empty, empty), np.empty((0, 2), np.int32)
        merged = TableUpdate(*(np.concatenate(column) for column in zip(*updates, strict=True)))
        return merged, np.concatenate(copies) if copies else np.empty((0, 2), np.int32)

    def held(self) -> Int32Array:
        """Every reference the slots hold, for the integrity check."""
        slots = np.arange(len(self.start), dtype=np.int32)
        rows, indices = ragged_ranges(slots, self.start, self.end - self.start)
        return self.table[rows, indices]

    def _writes_shared_block(
        self, slots: Int32Array, write_starts: Int32Array, ends: Int32Array
    ) -> np.ndarray:
        """[num slots] bool: the first written token falls into a block that others hold too.

        Only the first: everything after it is in blocks this sequence was alone to be given.
        """
        indices = write_starts // self.block_size
        inside = (indices < self.end[slots]) & (write_starts < ends)
        indices = np.where(inside, indices, 0)
        return inside & (self.pool.ref_counts[self.table[slots, indices]] > 1)

    def _copy_on_write(self, slots: Int32Array, indices: Int32Array) -> None:
        sources = self.table[slots, indices]
        destinations = self.pool.allocate(len(slots))
        self.pool.release(sources)
        self._write(slots, indices, destinations)
        self._copies.append(np.stack((sources, destinations), axis=1))

    def _set(self, slots: Int32Array, indices: Int32Array) -> None:
        self._write(slots, indices, self.pool.allocate(len(slots)))

    def _write(self, slots: Int32Array, indices: Int32Array, block_ids: Int32Array) -> None:
        self.table[slots, indices] = block_ids
        self._updates.append(TableUpdate(slots, indices, block_ids))


def ragged_ranges(
    rows: Int32Array, starts: Int32Array, lengths: Int32Array
) -> tuple[Int32Array, Int32Array]:
    """Flatten ranges [start, start + length), one per row: (row of each entry, entry)."""
    firsts = np.cumsum(lengths) - lengths
    entries = np.arange(lengths.sum(), dtype=np.int32) + np.repeat(starts - firsts, lengths)
    return np.repeat(rows, lengths), entries.astype(np.int32)
