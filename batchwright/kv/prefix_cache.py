"""PrefixCache: which nodes of the prefix tree have their KV in blocks.

The cache holds one reference per group on the block of a resident node, as long as some waiting
row will use it; the tree knows. "Resident" means scheduled: a Step writes all KV of a layer before
any token attends, and Steps run in order, so a block may be read from the Step that fills it.

Where the host has room, blocks that memory has no place for go there and come back when a row wants
them. A node is in one of the two places at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from batchwright.kv.block_table import BlockTable
from batchwright.kv.host_memory import HostMemory
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
        host: keeps blocks of the only group, which has no window; None: nothing does.
    """

    def __init__(
        self,
        tree: PrefixTree,
        tables: Sequence[BlockTable],
        next_use: NextUse | None = None,
        host: HostMemory | None = None,
    ) -> None:
        self._tree = tree
        self._next_use = next_use or (lambda nodes: np.zeros(len(nodes), np.int64))
        self._tables = tables
        self._blocks: Int32Array = np.full((len(tables), tree.capacity), ABSENT, np.int32)
        self._node_of_block = [np.full(t.pool.num_blocks, ABSENT, np.int32) for t in tables]
        self._host = host or HostMemory(0, 0)
        self._host_blocks: Int32Array = np.full(tree.capacity, ABSENT, np.int32)

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
            is_absent = self._blocks[0, nodes] == ABSENT
            if self._host:
                is_absent &= self._host_blocks[nodes] == ABSENT
            absent = np.flatnonzero(is_absent)
            return int(absent[0]) if len(absent) else num_nodes
        usable = np.ones(num_nodes + 1, np.bool_)
        lengths = np.arange(num_nodes + 1)
        for group, table in enumerate(self._tables):
            resident = self._blocks[group, nodes] != ABSENT
            last_absent = np.maximum.accumulate(np.where(resident, 0, lengths[1:]))
            run_start = np.concatenate(([0], last_absent))  # resident blocks [run_start, length)
            usable &= run_start <= _first_needed(table, lengths, limit)
        return int(np.flatnonzero(usable)[-1])

    def num_on_host(self, nodes: Int32Array) -> int:
        """Blocks of a matched prefix that are on the host."""
        return int(np.count_nonzero(self._host_blocks[nodes] != ABSENT)) if self._host else 0

    def adopt(
        self, slot: int, nodes: Int32Array, limit: int, make_room: Callable[[int], None]
    ) -> None:
        """Let an empty slot hold the blocks of a matched prefix; those on the host come back.

        Args:
            limit: as in `match`.
            make_room: frees blocks of the only group until there are so many.
        """
        if self.num_on_host(nodes):
            self._load(slot, nodes, make_room)
            return
        for group, table in enumerate(self._tables):
            first = int(_first_needed(table, np.array(len(nodes)), limit))
            table.adopt(slot, first, self._blocks[group, nodes[first:]])

    def _load(self, slot: int, nodes: Int32Array, make_room: Callable[[int], None]) -> None:
        """Let a slot hold nodes, bringing back those that are on the host.

        Those are mostly the last ones, but a node may be there while one below it is held by a row
        that has another block for the first.
        """
        table, blocks = self._tables[0], self._blocks[0, nodes]
        away = blocks == ABSENT
        host_ids = self._host_blocks[nodes[away]]
        # Making room must give up none of these.
        table.pool.share(blocks[~away])
        self._host_blocks[nodes[away]] = ABSENT
        make_room(len(host_ids))
        blocks[away] = table.pool.allocate(len(host_ids))
        table.hold(slot, 0, blocks)
        self._host.load(host_ids, blocks[away])
        self._keep(0, nodes[away], blocks[away])

    def insert(self, slot: int, nodes: Int32Array, first: int, end: int) -> None:
        """Blocks [first, end) of the slot's prompt are scheduled: keep those with future users."""
        self._fit_capacity()
        indices = np.arange(first, end)[self._tree.num_waiting[nodes[first:end]] > 0]
        for group, table in enumerate(self._tables):
            held = indices[(indices >= table.start[slot]) & (indices < table.end[slot])]
            held = held[self._blocks[group, nodes[held]] == ABSENT]
            self._keep(group, nodes[held], table.table[slot, held])
            if self._host:
                self._forget(nodes[held])

    def _keep(self, group: int, nodes: Int32Array, blocks: Int32Array) -> None:
        """Hold blocks of a group as those of nodes."""
        self._tables[group].pool.share(blocks)
        self._blocks[group, nodes] = blocks
        self._node_of_block[group][blocks] = nodes

    def drop(self, nodes: Int32Array) -> None:
        """Give up what there is of these nodes, on the device and on the host."""
        self._fit_capacity()
        self._release(nodes)
        if self._host:
            self._forget(nodes)

    def _release(self, nodes: Int32Array) -> None:
        """Give up the cache's references on these nodes."""
        for group, table in enumerate(self._tables):
            blocks = self._blocks[group, nodes]
            blocks = blocks[blocks != ABSENT]
            table.pool.release(blocks)
            self._blocks[group, nodes] = ABSENT
            self._node_of_block[group][blocks] = ABSENT

    def clear(self) -> None:
        """Give up everything."""
        self._fit_capacity()
        is_there = (self._blocks != ABSENT).any(axis=0) | (self._host_blocks != ABSENT)
        self.drop(np.flatnonzero(is_there).astype(np.int32))

    def adopted(self, group: int, nodes: Int32Array, limit: int) -> Int32Array:
        """The blocks that `adopt` would share in a group; those on the host get others."""
        first = int(_first_needed(self._tables[group], np.array(len(nodes)), limit))
        blocks = self._blocks[group, nodes[first:]]
        return blocks[blocks != ABSENT]

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
        dropped from every group, because a prefix is usable only if all groups have it. What the
        host has room for goes there.
        """
        nodes = self._evictable(group)
        if num_blocks < len(nodes):
            nodes = self._latest_first(nodes)[:num_blocks]
        self._save(nodes)
        self._release(nodes)

    def _latest_first(self, nodes: Int32Array) -> Int32Array:
        """Nodes in the order in which they are given up."""
        keys = (-self._tree.depth[nodes], self._tree.num_waiting[nodes], -self._next_use(nodes))
        return nodes[np.lexsort(keys)]

    def make_room_on_host(self, num_blocks: int) -> None:
        """Forget nodes that the host keeps, as above, until it can save so many blocks or has none
        of them left."""
        lack = num_blocks - self._host.num_free
        if lack > 0:
            self._forget(self._latest_first(self._on_host())[:lack])

    def _save(self, nodes: Int32Array) -> None:
        """Keep on the host what it has room for of nodes that are about to be given up.

        Their blocks are written: what a Step writes is held by its row at least until it is made.
        """
        if not self._host:
            return
        nodes = nodes[~self._host.is_coming(self._blocks[0, nodes])]
        lack = len(nodes) - self._host.num_free
        if lack > 0:  # some of these or of those that are there are used last of all
            on_host = self._on_host()
            given_up = self._latest_first(np.concatenate((on_host, nodes)))[:lack]
            self._forget(given_up[np.isin(given_up, on_host)])
            nodes = nodes[~np.isin(nodes, given_up)]
        self._host_blocks[nodes] = self._host.save(self._blocks[0, nodes])

    def _on_host(self) -> Int32Array:
        return np.flatnonzero(self._host_blocks != ABSENT).astype(np.int32)

    def _forget(self, nodes: Int32Array) -> None:
        """Give up what the host keeps of these nodes."""
        blocks = self._host_blocks[nodes]
        self._host.forget(blocks[blocks != ABSENT])
        self._host_blocks[nodes] = ABSENT

    def held(self, group: int) -> Int32Array:
        """The cache's references in a group, for the integrity check."""
        blocks = self._blocks[group]
        return blocks[blocks != ABSENT]

    def held_on_host(self) -> Int32Array:
        """Blocks that the host keeps for the cache, for the integrity check."""
        return self._host_blocks[self._on_host()]

    def _evictable(self, group: int) -> Int32Array:
        nodes = self._node_of_block[group]
        return nodes[(nodes != ABSENT) & (self._tables[group].pool.ref_counts == 1)]

    def _fit_capacity(self) -> None:
        missing = self._tree.capacity - self._blocks.shape[1]
        if missing > 0:
            self._blocks = np.pad(self._blocks, ((0, 0), (0, missing)), constant_values=ABSENT)
            self._host_blocks = np.pad(self._host_blocks, (0, missing), constant_values=ABSENT)


def _first_needed(table: BlockTable, num_blocks: np.ndarray, limit: int) -> np.ndarray:
    """First block that is visible when computing goes on after `num_blocks` resident blocks."""
    if table.window is None:
        return np.zeros_like(num_blocks)
    next_position = np.minimum(num_blocks * table.block_size, limit)
    first_key = np.maximum(next_position - table.window + 1, 0)
    return np.minimum(first_key // table.block_size, num_blocks)
