"""A row is as long as rows that have ended and share most of its prompt (BlendServe,
arXiv:2411.16102, section 5.1).

Rows that end first are the short ones, so those that still run count too: the mean of a subtree is
all tokens drawn in it over the rows that have ended, which has no such bias (it is the maximum
likelihood with censored observations, where a row may end at every token alike). Where nothing has
ended every row uses all that it may.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from batchwright.plan.job_tree import ROOT, Float64Array, Int64Array, JobTree, build_job_tree
from batchwright.plan.length_predictor import Lengths, Rows
from batchwright.request import Int32Array

MOST_KNOWN = 1024
"""Rows that are remembered, the latest: making their tree takes some milliseconds."""

LEAST_KNOWN = 4
"""Rows that must have ended in a subtree before it is judged by itself."""

SPREAD = 1.0
"""Standard deviations above the mean that memory is kept for (benchmarks/lengths.py)."""


class Predictor:
    """Means over subtrees of the rows that have ended."""

    def __init__(self) -> None:
        self._prompts: deque[Int32Array] = deque(maxlen=MOST_KNOWN)
        self._output: deque[int] = deque(maxlen=MOST_KNOWN)

    def learn(self, rows: Rows, output: Int64Array) -> None:
        """Remember these."""
        self._prompts.extend(rows.prompts)
        self._output.extend(output.tolist())

    def predict(self, rows: Rows, so_far: Int64Array) -> Lengths:
        """Mean, and SPREAD deviations above it."""
        most = rows.most.astype(np.float64)
        if not self._prompts:
            return Lengths(most, most)
        num_known = len(self._prompts)
        prompts = [*self._prompts, *rows.prompts]
        offsets = np.cumsum([0, *map(len, prompts)])
        tree = build_job_tree(np.concatenate(prompts), offsets)
        output = np.concatenate((np.array(self._output, np.float64), so_far))
        has_ended = np.arange(len(prompts)) < num_known
        source = smallest_known(tree, has_ended, min(LEAST_KNOWN, num_known))
        num_ended = tree.sum_over_users(has_ended)
        mean = tree.sum_over_users(output)[source] / num_ended[source]
        of_ended = np.where(has_ended, output, 0.0)
        mean_ended = tree.sum_over_users(of_ended)[source] / num_ended[source]
        square = tree.sum_over_users(of_ended**2)[source] / num_ended[source]
        spread = np.sqrt(np.maximum(square - mean_ended**2, 0.0))
        nodes = tree.node_of_row[num_known:]
        return Lengths(mean[nodes], (mean + SPREAD * spread)[nodes])


def smallest_known(tree: JobTree, is_known: np.ndarray, at_least: int = 1) -> Int64Array:
    """[num_nodes] int64, the smallest subtree around each node with so many known rows.

    Args:
        is_known: [num_rows] bool; `at_least` or more of all are.
    """
    # Whatever is above a node with known rows has some too, so the nodes without any come as whole
    # subtrees; each of these takes the node above it.
    num_known = tree.sum_over_users(is_known)
    has_enough = num_known >= at_least
    nodes = np.arange(tree.num_nodes)
    is_top = ~has_enough & has_enough[tree.parent]
    is_top[ROOT] = False
    source = np.where(is_top, tree.parent, nodes)
    latest = np.maximum.accumulate(np.where(is_top | has_enough, nodes, 0))
    return source[latest]


def lengths_from_samples(tree: JobTree, known: Float64Array, otherwise: float) -> Float64Array:
    """Expected output of every row from the rows whose output is known.

    A row gets the mean over the smallest subtree above it that holds a known row: rows that share
    more of their prompt tell more about one another.

    Args:
        known: [num_rows] output tokens, NaN where not known.
        otherwise: for all rows when none is known.
    Returns:
        [num_rows] float64; known rows keep what is known.
    """
    is_known = ~np.isnan(known)
    if not is_known.any():
        return np.full(tree.num_rows, otherwise)
    source = smallest_known(tree, is_known)
    num_known = tree.sum_over_users(is_known)
    mean = tree.sum_over_users(np.where(is_known, known, 0.0))[source] / num_known[source]
    return np.where(is_known, known, mean[tree.node_of_row])
