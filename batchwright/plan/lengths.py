"""How long outputs will be, judged by those that are known."""

from __future__ import annotations

import numpy as np

from batchwright.plan.job_tree import ROOT, Float64Array, JobTree


def lengths_from_samples(tree: JobTree, known: Float64Array, otherwise: float) -> Float64Array:
    """Expected output of every row from the rows whose output is known.

    A row gets the mean over the smallest subtree above it that holds a known row: rows that share
    more of their prompt tell more about one another (BlendServe, arXiv:2411.16102, section 5.1).

    Args:
        known: [num_rows] output tokens, NaN where not known.
        otherwise: for all rows when none is known.
    Returns:
        [num_rows] float64; known rows keep what is known.
    """
    is_known = ~np.isnan(known)
    num_known = tree.sum_over_users(is_known)
    if not num_known[ROOT]:
        return np.full(tree.num_rows, otherwise)
    # Whatever is above a node with known rows has some too, so the nodes without any come as whole
    # subtrees; each of these takes the mean of the node above it.
    nodes = np.arange(tree.num_nodes)
    is_top = (num_known == 0) & (num_known[tree.parent] > 0)
    source = np.where(is_top, tree.parent, nodes)
    latest = np.maximum.accumulate(np.where(is_top | (num_known > 0), nodes, 0))
    source = source[latest]
    mean = tree.sum_over_users(np.where(is_known, known, 0.0))[source] / num_known[source]
    return np.where(is_known, known, mean[tree.node_of_row])
