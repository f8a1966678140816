"""JobTree: the prefix tree of a whole job, from its token arrays; no object per row or per token.

A node is a run of tokens that the same rows share: it ends where its rows part, or where one ends.
Nodes are numbered depth first and rows are sorted by their tokens, so everything below a node is
one range of nodes and one range of rows, and sums are differences of cumulative sums.

`plan/prefix_tree.py` is the other tree: blocks of the rows in the engine, changing row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.request import Int32Array

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

ROOT = 0


@dataclass(frozen=True, slots=True, eq=False)
class JobTree:
    """Compressed trie of a job's prompts. Node 0 is the root, with no tokens.

    Attributes:
        rows: [num_rows] int32, rows by their tokens; equal prompts by row.
        node_of_row: [num_rows] int32, the node at whose end a row's prompt ends.
        parent: [num_nodes] int32, -1 for the root; a parent comes before its children.
        depth: [num_nodes] int32, tokens from the root to the node's end.
        first, end: [num_nodes] int32, a node's users are rows[first:end].
    """

    rows: Int32Array
    node_of_row: Int32Array
    parent: Int32Array
    depth: Int32Array
    first: Int32Array
    end: Int32Array

    @property
    def num_rows(self) -> int:
        """Rows of the job."""
        return len(self.rows)

    @property
    def num_nodes(self) -> int:
        """Nodes, root included."""
        return len(self.parent)

    @property
    def start(self) -> Int32Array:
        """[num_nodes] int32, depth at which a node's own tokens begin."""
        start = self.depth[self.parent]
        start[ROOT] = 0
        return start

    @property
    def num_users(self) -> Int32Array:
        """[num_nodes] int32, rows whose prompt passes through or ends at a node."""
        return self.end - self.first

    @property
    def num_ending(self) -> Int64Array:
        """[num_nodes] int64, rows whose prompt ends at a node."""
        return np.bincount(self.node_of_row, minlength=self.num_nodes)

    @property
    def subtree_end(self) -> Int64Array:
        """[num_nodes] int64: the nodes below and including v are [v, subtree_end[v])."""
        ends = np.searchsorted(self.first, self.end, "left")
        ends[ROOT] = self.num_nodes  # also without any rows
        return ends

    def sum_over_users(self, values: np.ndarray) -> Float64Array:
        """[num_nodes] float64, sums of values [num_rows] over each node's users."""
        sums = np.concatenate(([0.0], np.cumsum(values[self.rows], dtype=np.float64)))
        return sums[self.end] - sums[self.first]

    def sum_over_subtree(self, values: np.ndarray) -> Float64Array:
        """[num_nodes] float64, sums of values [num_nodes] over each node and all below it."""
        sums = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
        return sums[self.subtree_end] - sums[:-1]

    def sum_over_path(self, values: np.ndarray, dtype: type = np.int64) -> np.ndarray:
        """[num_nodes] `dtype`, sums of values [num_nodes] over each node and all above it."""
        changes: np.ndarray = np.zeros(self.num_nodes + 1, dtype)
        changes[:-1] = values
        np.subtract.at(changes, self.subtree_end, values)
        return np.cumsum(changes)[:-1]

    def min_over_users(self, values: np.ndarray) -> np.ndarray:
        """[num_nodes], least of values [num_rows] among each node's users; at least one row."""
        ranges = np.stack((self.first, self.end), axis=1).ravel()
        ordered = values[self.rows]
        return np.minimum.reduceat(np.append(ordered, ordered[-1]), ranges)[::2]

    def num_distinct_tokens(self) -> int:
        """Tokens to compute when every shared one is computed once."""
        return int((self.depth - self.start).sum(dtype=np.int64))

    def in_blocks(self, block_size: int) -> JobTree:
        """The same tree with depths rounded down to whole blocks: what blocks can share."""
        return replace(self, depth=self.depth // block_size * block_size)

    def depth_first(self, key: np.ndarray) -> Walk:
        """Rows depth first, siblings by `key` [num_nodes], smallest first.

        Rows that end at a node come before those that go on. No order of siblings changes what
        can be shared.
        """
        by_parent = np.lexsort((key, self.parent))[1:]  # the root, whose parent is -1, is first
        users = self.num_users[by_parent].astype(np.int64)
        before = np.cumsum(users) - users  # users of earlier siblings, and of other parents'
        parents = self.parent[by_parent]
        is_first = np.concatenate(([True], parents[1:] != parents[:-1]))[: len(parents)]
        firsts = np.flatnonzero(is_first)
        before -= np.repeat(before[firsts], np.diff(np.append(firsts, len(parents))))
        offset = np.zeros(self.num_nodes, np.int64)  # from the parent's first row to one's own
        offset[by_parent] = before + self.num_ending[parents]
        first_line = self.sum_over_path(offset)
        nodes = self.node_of_row[self.rows]
        lines = first_line[nodes] + np.arange(self.num_rows) - self.first[nodes]
        rows = np.empty_like(self.rows)
        rows[lines] = self.rows
        return Walk(rows, first_line)


class Walk(NamedTuple):
    """Rows in an order that keeps subtrees together.

    Attributes:
        rows: [num_rows] int32, every row once.
        first_line: [num_nodes] int64, where in `rows` a node's users begin; its `num_ending` rows
            are the first of them.
    """

    rows: Int32Array
    first_line: Int64Array


def build_job_tree(
    tokens: Int32Array, offsets: Int64Array, namespaces: np.ndarray | None = None
) -> JobTree:
    """The prefix tree of a job.

    Args:
        tokens: [num_tokens] int32, all prompts one after another; a memory map is read in part.
        offsets: [num_rows + 1] int64, row i's prompt is tokens[offsets[i]:offsets[i + 1]].
        namespaces: [num_rows] int, rows of different namespaces share nothing; None: all share.
    """
    # The two loops that numpy cannot express; compiled only when a job is planned.
    from batchwright.kernels.prefix_sort.numba import sort_prompts, trie_nodes

    num_rows = len(offsets) - 1
    groups = np.zeros(num_rows, np.int32) if namespaces is None else np.asarray(namespaces)
    rows, shared = sort_prompts(tokens, offsets, groups)
    lengths = np.diff(offsets)[rows]
    parent, depth, first, end, node_of_line = trie_nodes(shared, lengths)
    order = np.argsort(first.astype(np.int64) << 32 | depth, kind="stable")  # depth first
    number = np.empty(len(order) + 1, np.int32)
    number[order], number[-1] = np.arange(len(order)), -1  # so that the root's parent stays -1
    node_of_row = np.empty(num_rows, np.int32)
    node_of_row[rows] = number[node_of_line]
    return JobTree(rows, node_of_row, number[parent[order]], depth[order], first[order], end[order])
