"""First come, first served: rows start in the order of the file."""

from __future__ import annotations

import numpy as np

from batchwright.plan.order import JobFacts, Order


def fcfs(job: JobFacts) -> Order:
    """Rows as they come. The yardstick of every other order."""
    return Order(np.arange(job.num_rows, dtype=np.int32))
