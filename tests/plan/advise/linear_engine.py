"""The real scheduler on a LinearCost, for rows of given lengths."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from batchwright.clock import VirtualClock
from batchwright.exec.sim import LinearCost, SimExecutor
from batchwright.kv.groups import KVGroup
from batchwright.request import Request, SamplingParams
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import Sequence


def sequences(lengths: Seq[tuple[int, int]]) -> list[Sequence]:
    """Rows of (prompt, output) tokens that share nothing."""
    made = []
    for row, (num_prompt, num_output) in enumerate(lengths):
        prompt = np.full(num_prompt, row, np.int32)
        params = SamplingParams(ignore_eos=True)
        request = Request(id=str(row), prompt_token_ids=prompt, params=params)
        made.append(
            Sequence(
                request=request,
                order=row,
                sample_index=0,
                end_token_ids=(),
                noise_key=row,
                max_len=num_prompt + num_output,
                token_ids=prompt,
            )
        )
    return made


def run_linear(
    cost: LinearCost, lengths: Seq[tuple[int, int]], *, max_num_seqs: int
) -> tuple[float, int]:
    """(seconds, output tokens) of the rows."""
    scheduler = Scheduler(
        [KVGroup(None, 10**5)],
        block_size=32,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(512, max_num_seqs),
        max_model_len=4096,
    )
    clock = VirtualClock()
    executor = SimExecutor(clock, cost)
    for sequence in sequences(lengths):
        scheduler.add(sequence)
    while (step := scheduler.schedule()) is not None:
        scheduler.update(executor.execute(step))
    return clock.now(), sum(output for _, output in lengths)
