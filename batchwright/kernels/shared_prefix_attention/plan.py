"""Which keys of a step are attended by matrix products, for all rows that share them at once.

The block tables of a step's rows, sorted, are a tree: rows whose tables begin with the same blocks
share a node, and a node's children share more. Keys of a node worth it are attended once for all
its query tokens; all other keys are left to the paged kernel, and the parts are merged by their
log-sum-exp. Every query token of a node comes after all its keys, so no mask is needed.
Source: Hydragen (arXiv:2402.05099), in its hierarchical form, with groups of any sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from batchwright.kernels.paged_attention.plan import (
    AttentionPlan,
    loaded_keys,
    plan_attention,
    sort_rows,
)
from batchwright.request import Int32Array


class SharedNode(NamedTuple):
    """Keys that are attended once for several query tokens.

    Attributes:
        tokens: [num] int32, the query tokens.
        slot: a line of the block table that holds these keys; all users' lines do.
        start, end: positions [start, end) of the keys, multiples of the tile of 128.
    """

    tokens: Int32Array
    slot: int
    start: int
    end: int


class SharedPrefixPlan(NamedTuple):
    """A step's attention: `nodes` by products, parents first; `rest` by the paged kernel."""

    nodes: tuple[SharedNode, ...]
    rest: AttentionPlan

    @property
    def loaded_keys(self) -> int:
        """Keys loaded per kv head: a node's once, however many rows it has."""
        return sum(node.end - node.start for node in self.nodes) + loaded_keys(self.rest)


class NodeCost(NamedTuple):
    """When products win: measured on one thread by benchmarks/shared_prefix.py.

    The paged kernel loads a key once for up to 96 query rows, so what products save is the
    difference of two rates, not the reading of keys.

    Attributes:
        saved_s_per_flop: of the two products, against the paged kernel.
        gather_s_per_element: copying a key's or a value's element to where products want it.
        merge_s_per_element: weighing and adding an element of the output.
        node_s: calls, whatever the size.
    """

    saved_s_per_flop: float = 4e-12
    gather_s_per_element: float = 1e-9
    merge_s_per_element: float = 1e-9
    node_s: float = 60e-6


def plan_shared_prefixes(
    cu_seqlens_q: Int32Array,
    row_slots: Int32Array,
    positions: Int32Array,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_table: Int32Array,
    block_size: int,
    window: int | None = None,
    cost: NodeCost | None = None,
    min_tokens: int = 2,
) -> SharedPrefixPlan:
    """Choose the nodes of a step.

    Args:
        cu_seqlens_q, row_slots, positions, num_q_heads, num_kv_heads, block_table, block_size,
            window: as in `plan_attention`. With a window there are no nodes: what a token sees of
            a prefix depends on its position.
        cost: a node is taken if it saves time by these numbers; None: NodeCost().
        min_tokens: fewest query tokens of a node, at least 2.

    Which nodes are chosen changes results by rounding only.
    """
    rest = plan_attention(
        cu_seqlens_q,
        row_slots,
        positions,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        window=window,
        block_table=block_table,
        block_size=block_size,
    )
    if window is not None or len(row_slots) < 2 or not len(positions):
        return SharedPrefixPlan((), rest)
    cost = cost or NodeCost()
    order, shared = sort_rows(cu_seqlens_q, row_slots, positions, block_table, block_size)
    per_pair = 4 * head_dim * num_q_heads * cost.saved_s_per_flop
    per_key = 2 * head_dim * num_kv_heads * cost.gather_s_per_element
    per_token = head_dim * num_q_heads * cost.merge_s_per_element
    found, row_starts = _choose_nodes(
        shared, np.diff(cu_seqlens_q)[order], per_pair, per_key, per_token, cost.node_s, min_tokens
    )
    first_keys = np.empty(len(order), np.int32)
    first_keys[order] = row_starts
    token_starts = np.repeat(first_keys, np.diff(cu_seqlens_q))
    nodes = tuple(
        SharedNode(
            _tokens_of(cu_seqlens_q, order[first:end]), int(row_slots[order[first]]), start, stop
        )
        for first, end, start, stop in found.tolist()
    )
    return SharedPrefixPlan(nodes, rest._replace(key_start=token_starts[rest.tokens]))


def _tokens_of(cu_seqlens_q: Int32Array, rows: Any) -> Int32Array:
    """Query tokens of rows."""
    if len(cu_seqlens_q) - 1 == cu_seqlens_q[-1]:  # a token each
        return np.ascontiguousarray(rows, np.int32)
    return np.concatenate(
        [np.arange(cu_seqlens_q[row], cu_seqlens_q[row + 1], dtype=np.int32) for row in rows]
    )


@njit(cache=True)
def _choose_nodes(
    shared: Any,
    num_tokens: Any,
    per_pair: float,
    per_key: float,
    per_token: float,
    per_node: float,
    min_tokens: int,
) -> Any:
    """Walk the tree of sorted rows from the root.

    Args:
        shared: [num_rows] keys that row i shares with row i + 1; the last is 0.
        num_tokens: [num_rows]
    Returns:
        nodes [num, 4] (first row, end row, start key, end key), and per row its first key that no
        node holds.
    """
    num_rows = len(shared)
    nodes = np.empty((num_rows, 4), np.int64)
    row_starts = np.zeros(num_rows, np.int32)
    num_nodes = 0
    # Ranges of rows whose keys from `start` on are open. A range is split where its rows share
    # least, so a stack no deeper than the number of rows holds what is left.
    stack = np.empty((num_rows + 1, 3), np.int64)
    stack[0, 0], stack[0, 1], stack[0, 2] = 0, num_rows, 0
    depth = 1
    while depth:
        depth -= 1
        first, end, start = stack[depth, 0], stack[depth, 1], stack[depth, 2]
        if end - first == 1:
            row_starts[first] = start
            continue
        common = shared[first : end - 1].min()
        if common > start:
            tokens = num_tokens[first:end].sum()
            keys = common - start
            # the first token's keys are read either way; a node is for those that read them again
            saved = keys * (tokens * per_pair - per_key) - tokens * per_token - per_node
            if tokens >= min_tokens and saved > 0:
                node = nodes[num_nodes]
                node[0], node[1], node[2], node[3] = first, end, start, common
                num_nodes += 1
                start = common
        begin = first
        for row in range(first, end):
            if row == end - 1 or shared[row] == common:
                stack[depth, 0], stack[depth, 1], stack[depth, 2] = begin, row + 1, start
                depth += 1
                begin = row + 1
    return nodes[:num_nodes], row_starts
