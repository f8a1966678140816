"""measure_link: how fast ranks on this processor add up what each of them has.

The ranks are threads of this process, each with its own end of gloo's connections, which is what
processes would have; starting those takes seconds. Their first touch of cold memory, and waiting
for one that is late, are not in it.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from batchwright.plan.exchange import Link, sum_share
from batchwright.tensor_parallel.ranks import Ranks, join

FEW, MANY = 1, 256
"""Tokens whose hidden states are summed: what a small step and a large one send."""

NUM_TIMES = 20


def measure_link(num_ranks: int, hidden_size: int, dtype: torch.dtype) -> Link:
    """The link that explains what sums over these ranks take (about 0.1 s).

    `bytes_per_s` holds for this number of ranks: it includes adding up, and that gloo gathers all
    parts on every rank, as if an all-reduce had moved `sum_share` of the bytes.
    """
    with (
        tempfile.TemporaryDirectory(prefix="batchwright-link-") as directory,
        ThreadPoolExecutor(num_ranks) as pool,
    ):
        store = Path(directory) / "store"
        ranks = list(
            pool.map(lambda rank: join(store, rank, num_ranks, on_gpu=False), range(num_ranks))
        )
        few_s, many_s = (
            max(pool.map(lambda one, n=num: _usual_s(one, n, hidden_size, dtype), ranks))
            for num in (FEW, MANY)
        )
    num_bytes = (MANY - FEW) * hidden_size * dtype.itemsize * sum_share(num_ranks)
    return Link(num_bytes / max(many_s - few_s, 1e-9), few_s)


def _usual_s(ranks: Ranks, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> float:
    """The median time of one sum."""
    hidden = torch.zeros(num_tokens, hidden_size, dtype=dtype)
    times = []
    for _ in range(NUM_TIMES):
        start_s = time.perf_counter()
        ranks.sum(hidden)
        times.append(time.perf_counter() - start_s)
    return float(np.median(times))
