"""Requests that come one by one to an engine that serves one at a time: M/G/1, with a token limit.

Service takes S = token_s n + fixed_s for n output tokens; n_max cuts n off. Few requests are long,
but the wait grows with the second moment of S, which they make: a limit that cuts a few off removes
most of the wait. Source: arXiv:2407.05347, section on max-token clipping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.errors import ConfigError

FloatArray = npt.NDArray[np.float64]


class Service(NamedTuple):
    """Seconds of serving one request: `token_s` for each output token, and `fixed_s`."""

    token_s: float
    fixed_s: float = 0.0


class ClippedQueue(NamedTuple):
    """A queue under a token limit.

    Attributes:
        max_tokens: the limit.
        utilisation: share of the time in which the server is busy; from 1 on it is unstable.
        wait_s: mean wait before service; inf if unstable.
        mean_tokens: of an output.
        clipped_fraction: of the requests, that the limit cuts off.
    """

    max_tokens: int
    utilisation: float
    wait_s: float
    mean_tokens: float
    clipped_fraction: float


def length_tail(lengths: npt.NDArray[np.int64]) -> FloatArray:
    """P(N > k) for k = 0, 1, ... up to the longest, of a sample of output lengths."""
    counts = np.bincount(lengths)
    return 1 - np.cumsum(counts) / counts.sum()


def clipped_queue(
    tail: FloatArray, arrivals_per_s: float, service: Service, max_tokens: int
) -> ClippedQueue:
    """The queue if outputs end at `max_tokens`; Poisson arrivals, first come first served.

    Args:
        tail: P(N > k) for k = 0, 1, ...; 0 beyond its end.
    """
    within = tail[:max_tokens]
    mean = float(within.sum())
    square = float(((2 * np.arange(len(within)) + 1) * within).sum())  # E[n^2]
    service_s = service.token_s * mean + service.fixed_s
    service_square = service_s**2 + service.token_s**2 * (square - mean**2)
    utilisation = arrivals_per_s * service_s
    wait_s = math.inf
    if utilisation < 1:  # Pollaczek and Khinchine
        wait_s = arrivals_per_s * service_square / (2 * (1 - utilisation))
    clipped = float(tail[max_tokens]) if max_tokens < len(tail) else 0.0
    return ClippedQueue(max_tokens, utilisation, wait_s, mean, clipped)


def choose_limit(
    tail: FloatArray,
    arrivals_per_s: float,
    service: Service,
    limits: Sequence[int],
    *,
    tokens_per_s_waited: float,
) -> ClippedQueue:
    """The limit with the most tokens served per request, less what its wait is worth.

    Args:
        limits: to choose from.
        tokens_per_s_waited: tokens that are worth a second of waiting.
    Raises:
        ConfigError: the queue grows without end under every limit.
    """
    queues = [clipped_queue(tail, arrivals_per_s, service, limit) for limit in limits]
    stable = [queue for queue in queues if queue.utilisation < 1]
    if not stable:
        raise ConfigError(
            f"{arrivals_per_s:g} requests per second are more than one request at a time can "
            f"serve, even with {min(limits)} tokens each; lower --arrivals"
        )
    return max(stable, key=lambda q: (q.mean_tokens - tokens_per_s_waited * q.wait_s, q.max_tokens))
