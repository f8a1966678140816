"""Sorting prompts by their tokens, and the trie of sorted prompts, without an object per token.

The sort goes by depth (multikey sorting, Bentley and Sedgewick 1997): prompts that agree up to some
depth form a range. What the whole range shares is skipped in one pass over each prompt's memory,
then the range is sorted by the one token after that and falls into smaller ranges. Every token up
to where a prompt differs from all others is read once or twice; the rest is never read, so a
spilled token file is read only in part. No recursion: ranges wait on a stack.

Exact. Twin: naive.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from batchwright.kernels.parallel import read_only
from batchwright.request import Int32Array

ENDED = -(2**40)
"""Sorts before every token: a prompt comes before those it is a prefix of."""


def sort_prompts(
    tokens: Int32Array, offsets: np.ndarray, groups: np.ndarray
) -> tuple[Int32Array, Int32Array]:
    """Rows in order of (group, tokens, row), and how many tokens neighbours share.

    Args:
        tokens: [num_tokens] int32, all prompts one after another; may be a memory map.
        offsets: [num_rows + 1] int64, row i's prompt is tokens[offsets[i]:offsets[i + 1]].
        groups: [num_rows] int, prompts of different groups share nothing.
    Returns:
        (rows [num_rows] int32, shared [num_rows] int32): shared[i] is the length of the common
        beginning of prompts rows[i - 1] and rows[i], 0 for the first and between groups.
    """
    rows = np.argsort(groups, kind="stable").astype(np.int32)
    ordered = groups[rows]
    borders = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    borders = np.concatenate(([0], borders, [len(rows)])).astype(np.int64)
    shared = np.zeros(len(rows), np.int32)
    offsets = np.ascontiguousarray(offsets, np.int64)
    _sort(read_only(np.asarray(tokens)), read_only(offsets), borders, rows, shared)
    return rows, shared


def trie_nodes(shared: Int32Array, lengths: np.ndarray) -> tuple[Int32Array, ...]:
    """The compressed trie of sorted prompts, in no particular order; node 0 is the root.

    Args:
        shared: see sort_prompts.
        lengths: [num_rows] tokens of each prompt, in sorted order.
    Returns:
        (parent, depth, first, end, node_of_line), int32: per node its parent (-1 for the root),
        the tokens down to its end, and the range of sorted lines below it; per line its node.
    """
    arrays = tuple(np.empty(2 * len(shared) + 1, np.int32) for _ in range(4))
    node_of_line = np.empty(len(shared), np.int32)
    num_nodes = _link(shared, np.asarray(lengths, np.int32), *arrays, node_of_line)
    return *(array[:num_nodes].copy() for array in arrays), node_of_line


@njit(cache=True)
def _sort(tokens: Any, offsets: Any, borders: Any, rows: Any, shared: Any) -> None:
    """Sort each range between two borders; see sort_prompts."""
    keys = np.empty(len(rows), np.int64)
    # Ranges on the stack are disjoint and have two rows or more.
    stack = np.empty((len(rows) // 2 + 1, 3), np.int64)
    for border in range(len(borders) - 1):
        size = _push(stack, 0, borders[border], borders[border + 1], 0)
        while size:
            size -= 1
            first, end, depth = stack[size, 0], stack[size, 1], stack[size, 2]
            depth = _common_end(tokens, offsets, rows[first:end], depth)
            _sort_by_token(tokens, offsets, rows[first:end], keys[first:end], depth)
            start = first
            for line in range(first + 1, end + 1):
                if line < end:
                    if keys[line] == keys[start]:
                        continue
                    shared[line] = depth
                if keys[start] == ENDED:
                    shared[start + 1 : line] = depth
                else:
                    size = _push(stack, size, start, line, depth + 1)
                start = line


@njit(cache=True)
def _push(stack: Any, size: int, first: int, end: int, depth: int) -> int:
    """Put a range of at least two rows on the stack; returns the new size."""
    if end - first < 2:
        return size
    stack[size, 0], stack[size, 1], stack[size, 2] = first, end, depth
    return size + 1


@njit(cache=True)
def _common_end(tokens: Any, offsets: Any, rows: Any, depth: int) -> int:
    """Tokens that all these rows share, which is at least `depth`."""
    pivot = offsets[rows[0]]
    common = offsets[rows[0] + 1] - pivot
    for row in rows[1:]:
        start = offsets[row]
        common = min(common, offsets[row + 1] - start)
        position = depth
        while position < common and tokens[start + position] == tokens[pivot + position]:
            position += 1
        common = position
        if common == depth:
            break
    return common


@njit(cache=True)
def _sort_by_token(tokens: Any, offsets: Any, rows: Any, keys: Any, depth: int) -> None:
    """Sort rows by their token at `depth`, which becomes their key; equal ones keep their order."""
    is_sorted = True
    for line, row in enumerate(rows):
        position = offsets[row] + depth
        keys[line] = np.int64(tokens[position]) if position < offsets[row + 1] else ENDED
        is_sorted = is_sorted and (line == 0 or keys[line - 1] <= keys[line])
    if not is_sorted:
        order = np.argsort(keys, kind="mergesort")
        rows[:] = rows[order]
        keys[:] = keys[order]


@njit(cache=True)
def _link(
    shared: Any, lengths: Any, parent: Any, depth: Any, first: Any, end: Any, node_of_line: Any
) -> int:
    """Fill the arrays of trie_nodes; returns the number of nodes.

    The stack holds the path to the line before. A line leaves what it does not share and adds a
    node where it branches off and a node for its own end, if there are none.
    """
    path = np.empty(len(shared) + 2, np.int32)
    parent[0], depth[0], first[0], end[0] = -1, 0, 0, len(shared)
    path[0] = 0
    size, num_nodes = 1, 1
    for line in range(len(shared)):
        left = -1
        while depth[path[size - 1]] > shared[line]:
            size -= 1
            left = path[size]
            end[left] = line
        if depth[path[size - 1]] < shared[line]:  # somewhere inside the node that was left last
            node, num_nodes = num_nodes, num_nodes + 1
            parent[node], depth[node], first[node] = path[size - 1], shared[line], first[left]
            parent[left] = node
            path[size] = node
            size += 1
        if depth[path[size - 1]] < lengths[line]:
            node, num_nodes = num_nodes, num_nodes + 1
            parent[node], depth[node], first[node] = path[size - 1], lengths[line], line
            path[size] = node
            size += 1
        node_of_line[line] = path[size - 1]
    for index in range(1, size):
        end[path[index]] = len(shared)
    return num_nodes
