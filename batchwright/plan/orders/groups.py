"""Groups of one shared prefix each, those that decode most first (BatchLLM, arXiv:2412.03594).

Sharing on one level is simpler to run than a tree: a group's prefix is computed, its members run,
its memory is free. Which prefixes to choose is a trade-off, since a prefix below another's computes
the upper one's tokens again. The paper decides greedily; here a dynamic program over the tree finds
the grouping that saves most. Groups with much output per prompt token go first, so that prompts are
left to fill the steps of long decodes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from batchwright.plan.job_tree import ROOT, Int64Array, JobTree
from batchwright.plan.order import JobFacts, Order
from batchwright.plan.orders.prefix_dfs import prefix_dfs


def groups(job: JobFacts) -> Order:
    """Groups by expected output per prompt token, most first; members depth first."""
    if not job.num_rows:
        return prefix_dfs(job)
    group_of_row = single_level(job.tree).group_of_row
    is_alone = group_of_row == ROOT
    group_of_row = np.where(is_alone, job.tree.num_nodes + np.arange(job.num_rows), group_of_row)
    group, index = np.unique(group_of_row, return_inverse=True)
    prefix = np.append(job.tree.depth, np.zeros(job.num_rows, np.int32))[group]
    num_members = np.bincount(index)
    outputs = np.bincount(index, job.num_output_tokens)
    prompts = np.bincount(index, job.num_prompt_tokens) - (num_members - 1) * prefix
    ratio = outputs / np.maximum(prompts, 1)
    if job.continues is not None:
        ratio[index[job.continues]] = np.inf
    rows = prefix_dfs(job).rows
    first_line = np.full(len(group), job.num_rows)
    np.minimum.at(first_line, index[rows], np.arange(job.num_rows))
    rank = np.empty(len(group), np.int64)
    rank[np.lexsort((first_line, -ratio))] = np.arange(len(group))
    return Order(rows[np.argsort(rank[index[rows]], kind="stable")])


class Grouping(NamedTuple):
    """The best sharing on one level.

    Attributes:
        group_of_row: [num_rows] int64, the node whose end is the end of the row's shared prefix;
            ROOT for rows that share nothing.
        num_saved_tokens: prompt tokens that are not computed.
    """

    group_of_row: Int64Array
    num_saved_tokens: int


class _Level(NamedTuple):
    """Nodes with equally many candidates above them.

    Attributes:
        nodes: [num] node numbers.
        above: [num] their nearest candidates above, as indices into the level before.
        depths: [num, level + 1] depths of the candidates from the root to the node itself.
    """

    nodes: Int64Array
    above: Int64Array
    depths: Int64Array


def single_level(tree: JobTree) -> Grouping:
    """Choose the nodes whose prefixes are shared, each row using the deepest one above its end.

    A candidate is a node with several users whose end is deeper than its parent's, which blocks may
    round away. With f(v, a) the best saving of the rows below v when the deepest chosen candidate
    above v ends at depth a:

        f(v, a) = max(g(v, a), g(v, depth(v)) - depth(v)),   chosen when the second is larger
        g(v, a) = sum of f(c, a) over the candidates c next below v + (rows that end next to v) * a

    g grows with a, so v is chosen up to some a. The work is the number of (candidate, candidate
    above) pairs, never more than the job has tokens; it goes level by level, without recursion.
    """
    home = _nearest_candidates(tree)
    levels = _levels(tree, home)
    num_own_rows = np.bincount(home[tree.node_of_row], minlength=tree.num_nodes)
    chosen_up_to: list[Int64Array] = []  # per level: for how many of the candidates above
    gains = np.empty((0, 0), np.int64)  # f of the level below: [num, level + 1]
    for index, level in reversed(list(enumerate(levels))):
        kept = num_own_rows[level.nodes, None] * level.depths  # g: [num, level + 1]
        if index + 1 < len(levels):
            np.add.at(kept, levels[index + 1].above, gains)
        chosen = kept[:, -1:] - level.depths[:, -1:]
        chosen_up_to.insert(0, (chosen > kept[:, :-1]).sum(axis=1))
        gains = np.maximum(chosen, kept[:, :-1]) if index else kept
    group = np.full(tree.num_nodes, ROOT, np.int64)
    group_level = np.zeros(1, np.int64)  # of the deepest chosen candidate, for the level before
    for index, level in enumerate(levels[1:], 1):
        group_level = group_level[level.above]
        is_chosen = group_level < chosen_up_to[index]
        group_level = np.where(is_chosen, index, group_level)
        above = levels[index - 1].nodes[level.above]
        group[level.nodes] = np.where(is_chosen, level.nodes, group[above])
    return Grouping(group[home[tree.node_of_row]], int(gains[0, 0]))


def _nearest_candidates(tree: JobTree) -> Int64Array:
    """[num_nodes] the deepest candidate at or above each node; the root counts as one."""
    is_candidate = (tree.num_users > 1) & (tree.depth > tree.start)
    is_candidate[ROOT] = True
    home = np.where(is_candidate, np.arange(tree.num_nodes), tree.parent)
    while not is_candidate[home].all():
        home = home[home]
    return home


def _levels(tree: JobTree, home: Int64Array) -> list[_Level]:
    """Candidates by their number of candidates above; the root alone is level 0."""
    candidates = np.flatnonzero(home == np.arange(tree.num_nodes))
    is_candidate = np.zeros(tree.num_nodes, np.int64)
    is_candidate[candidates[1:]] = 1
    level_of = tree.sum_over_path(is_candidate)[candidates]
    place = np.zeros(tree.num_nodes, np.int64)
    levels = [_Level(candidates[:1], np.zeros(1, np.int64), np.zeros((1, 1), np.int64))]
    order = np.argsort(level_of, kind="stable")
    borders = np.cumsum(np.bincount(level_of))
    for first, end in pairwise(borders):
        nodes = candidates[order[first:end]]
        place[nodes] = np.arange(len(nodes))
        above = place[home[tree.parent[nodes]]]
        own_depth = tree.depth[nodes, None].astype(np.int64)
        depths = np.concatenate((levels[-1].depths[above], own_depth), axis=1)
        levels.append(_Level(nodes, above, depths))
    return levels
