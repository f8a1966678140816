"""Requests that come one by one: the real scheduler on a pretended model, by a virtual clock.

What continuous batching makes of a load that the formulas of `plan/advise/*_queue.py` bound; those
are the oracles it is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.clock import VirtualClock
from batchwright.exec.sim import SimExecutor, StepCost
from batchwright.request import Int32Array, Request, SamplingParams
from batchwright.sequence import Sequence
from batchwright.simulate import EngineSizes

FloatArray = npt.NDArray[np.float64]


class ArrivalRun(NamedTuple):
    """What came of the requests.

    Attributes:
        sojourn_s: [num_requests] from arrival to the last token.
        busy_fraction: share of the time in which something ran.
    """

    sojourn_s: FloatArray
    busy_fraction: float


def poisson_arrivals(num_requests: int, arrivals_per_s: float, seed: int) -> FloatArray:
    """[num_requests] ascending times of a Poisson process."""
    gaps = np.random.default_rng(seed).exponential(1 / arrivals_per_s, num_requests)
    return np.cumsum(gaps)


def simulate_arrivals(
    prompts: Seq[Int32Array],
    num_output: Seq[int],
    arrival_s: FloatArray,
    engine: EngineSizes,
    cost: StepCost,
) -> ArrivalRun:
    """Serve requests as they come, until all are done.

    Args:
        prompts: token ids of each request.
        num_output: tokens that each generates, at least 1.
        arrival_s: [num_requests] ascending.
    """
    scheduler, clock = engine.scheduler(), VirtualClock()
    executor = SimExecutor(clock, cost)
    sojourn_s = np.zeros(len(prompts))
    num_arrived, idle_s = 0, 0.0
    while True:
        while num_arrived < len(prompts) and arrival_s[num_arrived] <= clock.now():
            scheduler.add(_sequence(num_arrived, prompts[num_arrived], num_output[num_arrived]))
            num_arrived += 1
        step = scheduler.schedule()
        if step is not None:
            for sequence in scheduler.update(executor.execute(step)).finished:
                sojourn_s[sequence.order] = clock.now() - arrival_s[sequence.order]
        elif num_arrived < len(prompts):
            wait_s = float(arrival_s[num_arrived]) - clock.now()
            idle_s += wait_s
            clock.advance(wait_s)
        else:
            return ArrivalRun(sojourn_s, 1 - idle_s / max(clock.now(), 1e-12))


def _sequence(row: int, prompt: Int32Array, num_output: int) -> Sequence:
    params = SamplingParams(ignore_eos=True)
    return Sequence(
        request=Request(id=str(row), prompt_token_ids=prompt, params=params),
        order=row,
        sample_index=0,
        end_token_ids=(),
        noise_key=row,
        max_len=len(prompt) + num_output,
        token_ids=prompt,
    )
