"""Longest expected output first: nothing long is left for the end, when batches run empty.

List scheduling in this order is within 4/3 of the best makespan for independent rows (Graham 1969).
Rows of equal length are taken depth first, so that a job of one limit loses no sharing.
"""

from __future__ import annotations

import numpy as np

from batchwright.plan.order import JobFacts, Order
from batchwright.plan.orders.prefix_dfs import prefix_dfs


def longest_first(job: JobFacts) -> Order:
    """Rows by expected output, most first."""
    rows = prefix_dfs(job).rows
    return Order(rows[np.argsort(-job.num_output_tokens[rows], kind="stable")])
