"""PrefixTree: the shared prefixes of all rows that are known, and how many still wait for each.

A node is one full block of prompt tokens below its parent node; the roots are namespaces. Nodes
are keyed by their tokens themselves, never by a hash of them, so two prompts can never be taken
for one another. A row's prompt becomes an array of node ids once, when the row becomes known; all
later questions (who is still to come, what is resident) are array lookups.

Not here: which blocks are resident. That is `kv/prefix_cache.py`, which asks this tree.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from batchwright.request import Int32Array

ROOT = -1


class PrefixTree:
    """Trie of prompt blocks with counts of rows.

    Attributes:
        num_waiting: [capacity] int32, rows not yet admitted whose prompt passes through the node:
            the future users of its KV.
        depth: [capacity] int32, blocks above the node.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.num_waiting: Int32Array = np.zeros(1024, np.int32)
        self.depth: Int32Array = np.zeros(1024, np.int32)
        self._num_rows = [0] * 1024  # known rows, waiting or running; only used one by one
        self._node_of: dict[tuple[int, bytes], int] = {}
        self._key_of: list[tuple[int, bytes] | None] = []
        self._unused: list[int] = []
        self._shared: set[int] = set()  # first nodes that more than one row has passed through
        self._roots: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._node_of)

    @property
    def capacity(self) -> int:
        """Length of the per-node arrays; node ids are below it."""
        return len(self.num_waiting)

    def add(self, namespace: Hashable, token_ids: Int32Array, num_rows: int = 1) -> Int32Array:
        """Make `num_rows` waiting rows with this prompt known.

        Returns:
            [num_tokens // block_size] int32 node ids, root first.
        """
        parent = self._roots.setdefault(namespace, ROOT - len(self._roots))
        num_blocks = len(token_ids) // self.block_size
        raw = np.asarray(token_ids, np.int32).tobytes()
        width = 4 * self.block_size
        path = []
        for index in range(num_blocks):
            key = (parent, raw[index * width : (index + 1) * width])
            node = self._node_of.get(key)
            if node is None:
                node = self._create(key, index)
            path.append(node)
            parent = node
        if path and (num_rows > 1 or self._num_rows[path[0]]):
            self._shared.add(path[0])
        for node in path:
            self._num_rows[node] += num_rows
        nodes = np.array(path, np.int32)
        if len(path) < 12:  # one change at many places costs as much as 14 changes at one
            for node in path:
                self.num_waiting[node] += num_rows
        else:
            self.num_waiting[nodes] += num_rows
        return nodes

    def start(self, nodes: Int32Array) -> Int32Array:
        """One waiting row was admitted. Returns the nodes that nobody waits for any more."""
        self.num_waiting[nodes] -= 1
        return nodes[self.num_waiting[nodes] == 0]

    def wait_again(self, nodes: Int32Array) -> None:
        """One admitted row went back to waiting (preemption)."""
        self.num_waiting[nodes] += 1

    def is_alone(self, nodes: Int32Array) -> bool:
        """Whether no other row has been known, at the same time as this one, to share its nodes."""
        return not len(nodes) or int(nodes[0]) not in self._shared

    def forget(self, *prompts: Int32Array) -> None:
        """One admitted row with each of these nodes is done; unused nodes are removed."""
        for nodes in prompts:
            for node in reversed(nodes.tolist()):  # a child has no more rows than its parent
                self._num_rows[node] -= 1
                if not self._num_rows[node]:
                    self._remove(node)

    def _remove(self, node: int) -> None:
        key = self._key_of[node]
        assert key is not None
        del self._node_of[key]
        self._key_of[node] = None
        self._shared.discard(node)
        self._unused.append(node)

    def _create(self, key: tuple[int, bytes], depth: int) -> int:
        if self._unused:
            node = self._unused.pop()
            self._key_of[node] = key
        else:
            node = len(self._key_of)
            self._key_of.append(key)
            if node >= self.capacity:
                self.num_waiting = _doubled(self.num_waiting)
                self.depth = _doubled(self.depth)
                self._num_rows += [0] * len(self._num_rows)
        self._node_of[key] = node
        self.depth[node] = depth
        return node


def _doubled(array: Int32Array) -> Int32Array:
    return np.concatenate((array, np.zeros_like(array)))
