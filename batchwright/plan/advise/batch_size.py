"""How many sequences should run at once: throughput and latency by batch size, and where to stop.

Source: Batching Configuration Advisor (arXiv:2503.08311). Throughput T(B) flattens long before
memory is full, because decode attention waits for keys and values; what memory is then left serves
better for something else (`replicas.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from batchwright.errors import ConfigError

EPSILON = 0.2
"""A batch of B must reach this share of B times the throughput of one (the authors' default)."""

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512)
"""Batch sizes that are tried (the authors' sweep)."""

_ROUNDING = 1e-9  # a ratio that equals EPSILON but for rounding is not above it


class ProfilePoint(NamedTuple):
    """What one batch size gives.

    Attributes:
        batch_size: sequences that may run at once.
        tokens_per_s: throughput.
        token_s: mean seconds between two tokens of a sequence.
        kv_tokens: most tokens of keys and values in use at once.
    """

    batch_size: int
    tokens_per_s: float
    token_s: float
    kv_tokens: int


def best_batch(
    profile: Sequence[ProfilePoint],
    *,
    slo_s: float = math.inf,
    epsilon: float = EPSILON,
) -> ProfilePoint:
    """B_opt = max {B: T(B) / (B T(1)) > epsilon and L(B) <= SLO}.

    Args:
        profile: distinct batch sizes, 1 among them.
        slo_s: most seconds between two tokens of a sequence.
    Raises:
        ConfigError: no batch size is fast enough.
    """
    alone = next(point.tokens_per_s for point in profile if point.batch_size == 1)
    threshold = epsilon * (1 + _ROUNDING)
    allowed = [
        point
        for point in profile
        if point.tokens_per_s > threshold * point.batch_size * alone and point.token_s <= slo_s
    ]
    if not allowed:
        least_s = min(point.token_s for point in profile)
        raise ConfigError(
            f"a token every {slo_s * 1e3:g} ms is out of reach: the least is {least_s * 1e3:.3g} "
            "ms, for one sequence at a time; raise --latency-slo"
        )
    return max(allowed, key=lambda point: point.batch_size)
