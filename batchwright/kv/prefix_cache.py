"""PrefixCache: which nodes of the prefix tree have their KV in blocks.

The cache holds one reference per group on the block of a resident node, as long as some waiting
row will use it; the tree knows. "Resident" means scheduled: a Step writes all KV of a layer before
any token attends, and Steps run in order, so a block may be read from the Step that fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from batchwright.kv.block_table import BlockTable
from batchwright.plan.prefix_tree import PrefixTree
from batchwright.request import Int32Array

ABSENT = -1


NextUse = Callable[[Int32Array], npt.NDArray[np.int64]]
"""How soon each of some nodes will be used again; the smaller the sooner, a parent never later."""


class PrefixCache:
    """Resident blocks by prefix-tree node, one column per KV group.

    Args:
        tree: the prompts of all rows.
        tables: the blocks of running rows, one table per KV group.
        next_use: says what to give up first when memory is short; None: nobody knows.
    """

    def __init__(
        self, tree: PrefixTree, tables: Sequence[BlockTable], next_use: NextUse | None = None
    ) -> None:
        self._tree = tree
        self._next_use = next_use or (lambda nodes: np.zeros(len(nodes), np.int64))
        self._tables = tables
        self._blocks: Int32Array = np.full((len(tables), tree.capacity), ABSENT, np.int32)
        self._node_of_block = [np.full(t.pool.num_blocks, ABSENT, np.int32) for t in tables]

    def match(self, nodes: Int32Array, limit: int) -> int:
        """Longest prefix, in blocks, from whose end a sequence can go on.

        A full group needs all its blocks; a windowed group only those the next token can see.

        Args:
            nodes: the prompt's nodes, root first.
            limit: first position that must be computed whatever is resident.
        """
        self._fit_capacity()
        num_nodes = len(nodes)
        if len(self._tables) == 1 and self._tables[0].window is None:  # the common case, quickly
            absent = np.flatnonzero(self._blocks[0, nodes] == ABSENT)
            return int(absent[0]) if len(absent) else num_nodes
        usable = np.ones(num_nodes + 1, np.bool_)
        lengths = np.arange(num_nodes + 1)
        for group, table in enumerate(self._tables):
            resident = self._blocks[group, nodes] != ABSENT
            last_absent = np.maximum.accumulate(np.where(resident, 0, lengths[1:]))
            run_start = np.concatenate(([0], last_absent))  # resident blocks [run_start, length)
            usable &= run_start <= _first_needed(table, lengths, limit)
        return int(np.flatnonzero(usable)[-1])

    def adopt(self, slot: int, nodes: Int32Array, limit: int) -> None:
        """Let an empty slot hold the blocks of a matched prefix; `limit` as in `match`."""
        for group, table in enumerate(self._tables):
            first = int(_first_needed(table, np.array(len(nodes)), limit))
            table.adopt(slot, first, self._blocks[group, nodes[first:]])

    def insert(self, slot: int, nodes: Int32Array, first: int, end: int) -> None:
        """Blocks [first, end) of the slot's prompt are scheduled: keep those with future users."""
        self._fit_capacity()
        indices = np.arange(first, end)[self._tree.num_waiting[nodes[first:end]] > 0]
        for group, table in enumerate(self._tables):
            held = indices[(indices >= table.start[slot]) & (indices < table.end[slot])]
            held = held[self._blocks[group, nodes[held]] == ABSENT]
            blocks = table.table[slot, held]
            table.pool.share(blocks)
            self._blocks[group, nodes[held]] = blocks
            self._node_of_block[group][blocks] = nodes[held]

    def drop(self, nodes: Int32Array) -> None:
        """Give up the cache's references on these nodes."""
        self._fit_capacity()
        for group, table in enumerate(self._tables):
            blocks = self._blocks[group, nodes]
            blocks = blocks[blocks != ABSENT]
            table.pool.release(blocks)
            self._blocks[group, nodes] = ABSENT
            self._node_of_block[group][blocks] = ABSENT

    def clear(self) -> None:
        """Give up all references."""
        self.drop(np.flatnonzero((self._blocks != ABSENT).any(axis=0)).astype(np.int32))

    def adopted(self, group: int, nodes: Int32Array, limit: int) -> Int32Array:
        """The blocks that `adopt` would share in a group."""
        first = int(_first_needed(self._tables[group], np.array(len(nodes)), limit))
        return self._blocks[group, nodes[first:]]

    def num_evictable(self, group: int, *, but: Int32Array | None = None) -> int:
        """Blocks of a group that only the cache holds.

        Args:
            but: nodes that do not count.
        """
        nodes = self._evictable(group)
        return len(nodes if but is None else nodes[~np.isin(nodes, but)])

    def evict(self, group: int, num_blocks: int) -> None:
        """Free up to `num_blocks` blocks of a group, those first that are used again last.

        Among equals: fewest future users first, then deepest first. Zero is always safe. A node is
        dropped from every group, because a prefix is usable only if all groups have it.
        """
        nodes = self._evictable(group)
        if num_blocks < len(nodes):
            keys = (-self._tree.depth[nodes], self._tree.num_waiting[nodes], -self._next_use(nodes))
            nodes = nodes[np.lexsort(keys)[:num_blocks]]
        self.drop(nodes)

    def held(self, group: int) -> Int32Array:
        """The cache's references in a group, for the integrity check."""
        blocks = self._blocks[group]
        return blocks[blocks != ABSENT]

    def _evictable(self, group: int) -> Int32Array:
        nodes = self._node_of_block[group]
        return nodes[(nodes != ABSENT) & (self._tables[group].pool.ref_counts == 1)]

    def _fit_capacity(self) -> None:
        missing = self._tree.capacity - self._blocks.shape[1]
        if missing > 0:
            self._blocks = np.pad(self._blocks, ((0, 0), (0, missing)), constant_values=ABSENT)


def _first_needed(table: BlockTable, num_blocks: np.ndarray, limit: int) -> np.ndarray:
    """First block that is visible when computing goes on after `num_blocks` resident blocks."""
    if table.window is None:
        return np.zeros_like(num_blocks)
    next_position = np.minimum(num_blocks * table.block_size, limit)
    first_key = np.maximum(next_position - table.window + 1, 0)
    return np.minimum(first_key // table.block_size, num_blocks)
