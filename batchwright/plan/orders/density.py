"""Rows by how compute-heavy they are, started from both ends (BlendServe, arXiv:2411.16102).

Prompts are compute, decoding is memory traffic. Depth first, alike rows follow one another, and a
run has a stretch that computes and a stretch that reads. Here subtrees are sorted by density, and
rows from both ends run together, so that every step has the whole job's balance. What it gains
depends on the device doing both at once; where kernels run one after the other it gains nothing.

A subtree stays together unless its parts lie far apart in density. Parting costs the shared
prefix's tokens once more; parts that win most per token come first, and all partings together cost
at most a share of what the job shares. The paper divides a threshold among a node's parts on the
way down; a budget for the whole job can be kept exactly.

Subtrees of like density are one unit and start as they came; `dual_scan.py` says how rows from both
ends are mixed.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np

from batchwright.plan.job_tree import ROOT, Float64Array, Int64Array, JobTree
from batchwright.plan.order import JobFacts, Order, Rates, Units
from batchwright.plan.orders.prefix_dfs import prefix_dfs
from batchwright.request import Int32Array

MAX_DENSITY = 1e3
"""Density of rows that hardly decode: beyond it, more makes no difference."""

ALIKE = 4.0
"""Subtrees whose densities differ by less than about this factor are one unit, and start as they
came. Sorted by density, rows of the same length would start together, grow together and leave
together, and memory be half empty on average."""

NUM_OFFSETS = 16

RECOMPUTED_SHARE = 0.01
"""Share of the job's shared tokens that parting subtrees may compute again."""


def density(job: JobFacts) -> Order:
    """Units of rows, densest first, to be started from both ends."""
    if not job.num_rows:
        return prefix_dfs(job)
    tree = job.tree
    work = node_work(job)
    walk = tree.depth_first(-work.density)
    unit = _units(tree, work, RECOMPUTED_SHARE * _num_shared_tokens(tree))
    first_line = walk.first_line[unit.node]
    kind = _kinds(unit.density, unit.memory_s)
    sequence = np.lexsort((walk.rows[first_line], kind))
    size = unit.size[sequence]
    starts = np.cumsum(size) - size
    lines = np.arange(job.num_rows) + np.repeat(first_line[sequence] - starts, size)
    rows = walk.rows[lines]
    new_tokens = _new_tokens(job, walk.rows, walk.first_line)[lines]
    kv_tokens = new_tokens + job.num_output_tokens[rows] / 2
    kinds, place = np.unique(kind, return_inverse=True)
    compute_s, memory_s = (
        _sum_by(place, values, len(kinds)) for values in (unit.compute_s, unit.memory_s)
    )
    held = float((kv_tokens * job.num_output_tokens[rows]).sum())  # a token, for a Step
    num_steps = float(job.num_output_tokens[rows].sum())  # of rows, each by itself
    units = Units(
        np.bincount(place, unit.size).astype(np.int64),
        density_of(compute_s, memory_s),
        float(work.density[ROOT]),
        kv_tokens,
        float(new_tokens.sum()) / max(held, 1.0),
        held / num_steps if num_steps else math.inf,
    )
    return Order(rows, units)


def _kinds(density: Float64Array, memory_s: Float64Array) -> Int64Array:
    """[num_units] the kind of each unit, densest first; a kind spans ALIKE at most.

    Bounds lie where few units, by their memory traffic, are near: one kind of row is not parted.
    """
    place = -np.log(np.maximum(density, np.finfo(np.float64).tiny)) / np.log(ALIKE)
    offsets = np.arange(NUM_OFFSETS) / NUM_OFFSETS
    near = [memory_s[(place + o + 0.125) % 1 < 0.25].sum() for o in offsets]
    return np.floor(place + offsets[int(np.argmin(near))]).astype(np.int64)


def row_work(
    rates: Rates, num_prompt_tokens: np.ndarray, num_output_tokens: np.ndarray
) -> tuple[Float64Array, Float64Array]:
    """Seconds of compute and of memory traffic of rows that share nothing, each [num_rows]."""
    prompts, outputs = num_prompt_tokens.astype(np.float64), num_output_tokens
    compute = rates.compute_s_per_token * (prompts + outputs)
    compute = compute + rates.compute_s_per_pair * prompts**2
    return compute, rates.memory_s_per_key * (prompts * outputs + outputs**2 / 2)


def read_once_tokens(tree: JobTree, rows_per_load: int) -> Float64Array:
    """[num_rows] tokens of each prompt that others read for it, when attention shares reads.

    A token that g rows share costs each of them 1/g of a read, g being at most `rows_per_load`:
    rows of a subtree run together.
    """
    group = np.minimum(np.maximum(tree.num_users, 1), rows_per_load)
    saved = (tree.depth - tree.start) * (1 - 1 / group)
    return tree.sum_over_path(saved, np.float64)[tree.node_of_row]


def density_of(compute_s: np.ndarray, memory_s: np.ndarray) -> Float64Array:
    """Compute per memory traffic, at most MAX_DENSITY; 0 for no work at all."""
    floor = np.maximum(compute_s / MAX_DENSITY, np.finfo(np.float64).tiny)
    return compute_s / np.maximum(memory_s, floor)


class NodeWork(NamedTuple):
    """Work of each node's users, every shared token counted once; all [num_nodes].

    `own_*` are of the rows that end at the node.
    """

    compute_s: Float64Array
    memory_s: Float64Array
    density: Float64Array
    own_compute_s: Float64Array
    own_memory_s: Float64Array


def node_work(job: JobFacts) -> NodeWork:
    """What the rows below each node take."""
    tree, per_token = job.tree, job.rates.compute_s_per_token
    compute, memory = row_work(job.rates, job.num_prompt_tokens, job.num_output_tokens)
    if job.rates.rows_per_load > 1:
        unread = read_once_tokens(tree, job.rates.rows_per_load)
        memory = memory - job.rates.memory_s_per_key * unread * job.num_output_tokens
    saved = np.maximum(tree.num_users - 1, 0) * (tree.depth - tree.start).astype(np.float64)
    shared_below = tree.sum_over_subtree(saved) - saved
    shared_above = np.maximum(tree.num_users - 1, 0) * tree.depth.astype(np.float64)
    compute_s = tree.sum_over_users(compute) - per_token * (shared_below + shared_above)
    memory_s = tree.sum_over_users(memory)
    nodes, num_nodes = tree.node_of_row, tree.num_nodes
    shared_own = np.maximum(tree.num_ending - 1, 0) * tree.depth.astype(np.float64)
    own_compute_s = _sum_by(nodes, compute, num_nodes) - per_token * shared_own
    own_memory_s = _sum_by(nodes, memory, num_nodes)
    density = density_of(compute_s, memory_s)
    return NodeWork(compute_s, memory_s, density, own_compute_s, own_memory_s)


class _Unit(NamedTuple):
    """Rows kept together: the first `size` of the walk's rows below `node`; all [num_units]."""

    node: Int64Array
    size: Int64Array
    compute_s: Float64Array
    memory_s: Float64Array

    @property
    def density(self) -> Float64Array:
        return density_of(self.compute_s, self.memory_s)


def _units(tree: JobTree, work: NodeWork, budget: float) -> _Unit:
    is_parted = parted_nodes(tree, work, budget)
    is_whole = ~is_parted & np.append(False, is_parted[tree.parent[1:]])
    if not is_parted[ROOT]:
        is_whole[ROOT] = True
    whole = np.flatnonzero(is_whole)
    own = np.flatnonzero(is_parted & (tree.num_ending > 0))
    return _Unit(
        np.concatenate((whole, own)),
        np.concatenate((tree.num_users[whole], tree.num_ending[own])),
        np.concatenate((work.compute_s[whole], work.own_compute_s[own])),
        np.concatenate((work.memory_s[whole], work.own_memory_s[own])),
    )


def parted_nodes(tree: JobTree, work: NodeWork, budget: float) -> np.ndarray:
    """Nodes whose parts are placed apart, each computing the node's prefix itself.

    Args:
        budget: tokens that may be computed again in all.
    Returns:
        [num_nodes] bool; a node is parted only if all above it are.
    """
    has_own = tree.num_ending > 0
    num_parts = np.bincount(tree.parent[1:], minlength=tree.num_nodes) + has_own
    cost = np.maximum(num_parts - 1, 0) * tree.depth.astype(np.float64)
    gain = _misplaced_memory(tree, work)
    is_parted = np.zeros(tree.num_nodes, np.bool_)
    candidates = np.flatnonzero((num_parts > 1) & (cost <= budget) & (gain > 0))
    below: dict[int, list[int]] = {}
    for node, parent in zip(candidates.tolist(), tree.parent[candidates].tolist(), strict=True):
        below.setdefault(parent, []).append(node)
    # Sums that differ by rounding only are no reason to part.
    worth = np.divide(gain, cost, out=np.full(len(cost), np.inf), where=cost > 0)
    heap = [(-np.inf, ROOT)]  # parting the root costs nothing
    while heap:
        _, node = heapq.heappop(heap)
        if cost[node] > budget:
            continue
        budget -= cost[node]
        is_parted[node] = True
        for child in below.get(node, ()):
            heapq.heappush(heap, (-worth[child], child))
    return is_parted


def _misplaced_memory(tree: JobTree, work: NodeWork) -> Float64Array:
    """[num_nodes] how far a node's parts lie from its density, in seconds of traffic times that."""
    parent = tree.parent[1:]
    apart = np.abs(work.density[1:] - work.density[parent])
    apart[apart < 1e-9 * work.density[parent]] = 0.0
    gain = _sum_by(parent, apart * work.memory_s[1:], tree.num_nodes)
    own = np.abs(density_of(work.own_compute_s, work.own_memory_s) - work.density)
    return gain + np.where(own < 1e-9 * work.density, 0.0, own * work.own_memory_s)


def _num_shared_tokens(tree: JobTree) -> float:
    """Prompt tokens that the whole job need not compute."""
    saved = np.maximum(tree.num_users - 1, 0) * (tree.depth - tree.start).astype(np.float64)
    return float(saved.sum())


def _new_tokens(job: JobFacts, rows: Int32Array, first_line: Int64Array) -> Float64Array:
    """[num_rows] prompt tokens each row of a walk stores that the rows before it have not."""
    tree = job.tree
    new = (job.num_prompt_tokens - tree.depth[tree.node_of_row])[rows].astype(np.float64)
    has_users = tree.num_users > 0
    np.add.at(new, first_line[has_users], (tree.depth - tree.start)[has_users])
    return new


def _sum_by(nodes: np.ndarray, values: np.ndarray, num_nodes: int) -> Float64Array:
    """[num_nodes] sums of the values at each node."""
    return np.bincount(nodes, values, num_nodes).astype(np.float64, copy=False)
