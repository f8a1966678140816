"""A row uses the share of its allowed tokens that rows before it used, in this run or, when a job
goes on, in earlier ones (`job/history.py`).

It asks nothing about the prompt, so it needs few rows and no tree. A row that runs is compared with
those that used more than it has already.
"""

from __future__ import annotations

import numpy as np

from batchwright.plan.job_tree import Int64Array
from batchwright.plan.length_predictor import Lengths, Rows

NUM_SHARES = 64
"""Steps in which shares are counted."""

QUANTILE = 0.9
"""Share of rows that end within the memory that is kept for them (benchmarks/lengths.py)."""


class Predictor:
    """A histogram of used shares."""

    def __init__(self) -> None:
        self._counts = np.zeros(NUM_SHARES, np.float64)

    def learn(self, rows: Rows, output: Int64Array) -> None:
        """Count these."""
        places = np.ceil(output * (NUM_SHARES / np.maximum(rows.most, 1))).astype(np.int64) - 1
        self._counts += np.bincount(np.clip(places, 0, NUM_SHARES - 1), minlength=NUM_SHARES)

    def predict(self, rows: Rows, so_far: Int64Array) -> Lengths:
        """Mean and QUANTILE of the shares that are larger than what a row has used."""
        most = rows.most.astype(np.float64)
        if not self._counts.any():
            return Lengths(most, most)
        counts = np.append(self._counts, 1e-9)[:-1]
        counts[-1] += 1e-9  # a row beyond all that were seen may use all
        shares = (np.arange(NUM_SHARES) + 1) / NUM_SHARES
        first = np.minimum(so_far * NUM_SHARES // np.maximum(rows.most, 1), NUM_SHARES - 1)
        left = np.cumsum(counts[::-1])[::-1]
        mean = np.cumsum((counts * (shares - 0.5 / NUM_SHARES))[::-1])[::-1] / left
        before = left[0] - left
        place = np.searchsorted(np.cumsum(counts), before + QUANTILE * left - 1e-12)
        upper = shares[np.minimum(place, NUM_SHARES - 1)]
        return Lengths(mean[first] * most, upper[first] * most)
