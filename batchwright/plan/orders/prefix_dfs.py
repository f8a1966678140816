"""Depth first through the prefix tree: rows that share a prefix follow one another.

The memory a shared prefix takes is needed only while its rows run, so no order computes fewer
tokens when memory is short. Subtrees come in the order of their first rows.
"""

from __future__ import annotations

from batchwright.plan.order import JobFacts, Order


def prefix_dfs(job: JobFacts) -> Order:
    """Rows depth first, beginning with the subtree that is resident."""
    if not job.num_rows:
        return Order(job.arrival.astype("int32"))
    return Order(job.tree.depth_first(job.tree.min_over_users(job.arrival)).rows)
