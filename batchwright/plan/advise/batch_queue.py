"""Requests that come one by one to a server that serves them in batches.

A batch of b whose longest output has l tokens takes H(b, l) = k1 b + k2 + (k3 b + k4) l: prefill,
then decoding. Three ways to form batches:

- dynamic: all that wait, padded to the longest;
- fixed: always b, padded to the longest;
- elastic: all that wait, and a request leaves when it is finished, so decoding its neighbours gets
  cheaper.

Continuous batching is elastic and lets requests join too, so it waits no longer than these say.
Source: arXiv:2407.05347; the bounds are those for batches of linear time that it uses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from batchwright.plan.advise.single_queue import FloatArray


class BatchService(NamedTuple):
    """Seconds of serving a batch: k1 to k4 of the paper.

    Attributes:
        prompt_s: prefill of one request.
        prefill_s: prefill of a batch, besides.
        row_token_s: one decode step, for each request in it.
        step_s: one decode step, besides.
    """

    prompt_s: float
    prefill_s: float
    row_token_s: float
    step_s: float


class LinearBatch(NamedTuple):
    """A bound of a batch's time that is linear in its size: slope_s b + fixed_s."""

    slope_s: float
    fixed_s: float


def dynamic_batch(service: BatchService, max_tokens: float) -> LinearBatch:
    """Of dynamic batching: no output is longer than `max_tokens`, and all are padded to it."""
    return LinearBatch(
        service.prompt_s + service.row_token_s * max_tokens,
        service.prefill_s + service.step_s * max_tokens,
    )


def elastic_batch(service: BatchService, max_tokens: float, mean_tokens: float) -> LinearBatch:
    """Of elastic batching: each pays for its own tokens, all for the steps of the longest."""
    return LinearBatch(
        service.prompt_s + service.row_token_s * mean_tokens,
        service.prefill_s + service.step_s * max_tokens,
    )


def sojourn_bounds(batch: LinearBatch, arrivals_per_s: float) -> tuple[float, float]:
    """(phi0, phi1): the mean time from arrival to answer is at most each of them.

    inf if the queue is not stable, that is if requests come faster than 1 / slope.
    """
    rate, slope_s, fixed_s = arrivals_per_s, batch.slope_s, batch.fixed_s
    load = rate * slope_s
    if load >= 1:
        return math.inf, math.inf
    alone_s = (slope_s + fixed_s) / (2 * (1 - load))
    phi0 = alone_s * (1 + 2 * rate * fixed_s + (1 - rate * fixed_s) / (1 + load))
    phi1 = 1.5 * fixed_s / (1 - load) + slope_s / 2 * (load + 2) / (1 - load**2)
    return phi0, phi1


def mean_sojourn_bound(batch: LinearBatch, arrivals_per_s: float) -> float:
    """The lower of the two bounds."""
    return min(sojourn_bounds(batch, arrivals_per_s))


def fixed_batch_sojourn(
    service: BatchService, tail: FloatArray, arrivals_per_s: float, batch_size: int
) -> float:
    """Mean time from arrival to answer with batches of a fixed size; an approximation.

    A request waits for its batch to fill, then the batch waits for the server: arrivals of full
    batches are Erlang, and Kingman's formula stands for the wait.

    Args:
        tail: P(N > k) for k = 0, 1, ... of output lengths.
    Returns:
        Seconds; inf if the queue is not stable.
    """
    longest = 1 - (1 - tail) ** batch_size  # P(longest of the batch > k)
    mean = float(longest.sum())
    square = float(((2 * np.arange(len(tail)) + 1) * longest).sum())
    step_s = service.row_token_s * batch_size + service.step_s
    batch_s = service.prompt_s * batch_size + service.prefill_s + step_s * mean
    utilisation = arrivals_per_s * batch_s / batch_size
    if utilisation >= 1:
        return math.inf
    variation = 1 / batch_size + step_s**2 * (square - mean**2) / batch_s**2
    queue_s = utilisation / (1 - utilisation) * variation / 2 * batch_s
    return (batch_size - 1) / (2 * arrivals_per_s) + queue_s + batch_s
