"""Runs rows through the real scheduler on a pretended model, to learn how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from batchwright import techniques
from batchwright.clock import VirtualClock
from batchwright.config import AUTO_ORDER, ResolvedConfig
from batchwright.exec.sim import LinearCost, SimExecutor, StepCost
from batchwright.kv.groups import KVGroup, blocks_per_sequence
from batchwright.plan.auto_order import AutoOrder, Measured, Prediction, shared_tokens
from batchwright.plan.cost import CostModel, ModelShape
from batchwright.plan.order import JobFacts, OrderFunction, find_order, rates_of
from batchwright.plan.shared_keys import StepCosts
from batchwright.request import Request, SamplingParams, Task
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import Sequence

CROWDS = 4
"""A sample is run on all of the engine if it has so many times the rows that run at once; on a part
of it if not, lest its beginning and end, when few rows run, be all there is."""


@dataclass(frozen=True)
class SimulatedEngine:
    """The sizes of an engine; arguments as those of Scheduler, and what a Step costs."""

    groups: Seq[KVGroup]
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    cost: LinearCost | CostModel

    def predict(self, job: JobFacts, order: OrderFunction, share: float = 1.0) -> Prediction:
        """Time of a job whose outputs are as long as expected, on a machine as busy as it was.

        Args:
            share: of the job's rows, that these are; the time is that of all.
        """
        sequences = self._sequences(job)
        scale = min(1.0, job.num_rows / (CROWDS * self._crowd(job))) if share < 1 else 1.0
        scheduler = self._scheduler(sequences, order, scale)
        for sequence in sequences:
            scheduler.add(sequence)
        clock = VirtualClock()
        executor = SimExecutor(clock, self._costs())
        while scheduler.num_unfinished:
            step = scheduler.schedule()
            assert step is not None
            scheduler.update(executor.execute(step))
        busy = self.cost.hardware.busy if isinstance(self.cost, CostModel) else 1.0
        return Prediction(busy * clock.now() / share, scheduler.stats.num_steps)

    def _costs(self) -> StepCost:
        if isinstance(self.cost, CostModel):
            return StepCosts(self.cost, self.block_size)
        return self.cost

    def _crowd(self, job: JobFacts) -> float:
        """Rows that run at once, by slots or by memory."""
        kv_tokens = max(group.num_blocks for group in self.groups) * self.block_size
        per_row = (job.num_prompt_tokens + job.num_output_tokens / 2).mean()
        return max(min(self.max_num_seqs, kv_tokens / max(per_row, 1)), 1)

    def _scheduler(self, sequences: Seq[Sequence], order: OrderFunction, scale: float) -> Scheduler:
        num_seqs = max(round(scale * self.max_num_seqs), 1)
        num_tokens = max(round(scale * self.max_num_batched_tokens), num_seqs)
        longest = max((sequence.max_len for sequence in sequences), default=1)
        groups = []
        for group in self.groups:
            alone = blocks_per_sequence(group.window, longest, self.block_size, num_tokens)
            num_blocks = max(round(scale * group.num_blocks), alone)
            groups.append(KVGroup(group.window, num_blocks))
        return Scheduler(
            groups,
            block_size=self.block_size,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_tokens,
            max_model_len=max(self.max_model_len, longest),
            order=order,
        )

    def _sequences(self, job: JobFacts) -> list[Sequence]:
        """Rows that share what the job's rows share, of the same lengths."""
        paths = shared_tokens(job.tree, np.arange(job.num_rows))
        sequences = []
        for row, path in enumerate(paths):
            num_own = int(job.num_prompt_tokens[row]) - len(path)
            prompt = np.concatenate((path, np.full(num_own, -1 - row, np.int32)))
            num_output = round(float(job.num_output_tokens[row]))
            request = Request(
                id=str(row),
                prompt_token_ids=prompt,
                params=SamplingParams(ignore_eos=True),
                task=Task.GENERATE if num_output else Task.EMBED,
                pooling="last",
            )
            sequences.append(
                Sequence(
                    request=request,
                    order=row,
                    sample_index=0,
                    end_token_ids=(),
                    noise_key=row,
                    max_len=len(prompt) + num_output,
                    token_ids=prompt,
                )
            )
        return sequences


def chosen_order(
    config: ResolvedConfig,
    groups: Seq[KVGroup],
    shape: ModelShape,
    measure: Callable[[], CostModel],
) -> OrderFunction:
    """The order in which an engine with these settings starts rows.

    Args:
        shape: the model's.
        measure: what the model costs on this machine; asked at most once, if that pays.
    """
    if config.order != AUTO_ORDER:
        return find_order(config.order)
    from batchwright.exec.machine_cost import calibration_s, least_token_s

    def measured() -> Measured:
        start_s = time.perf_counter()
        cost = measure()
        simulated = SimulatedEngine(
            groups,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            cost=cost,
        )
        return Measured(simulated.predict, rates_of(cost), time.perf_counter() - start_s)

    return AutoOrder(
        measured,
        techniques.names("plan.orders"),
        measure_s=calibration_s(shape, config.num_threads),
        token_s=least_token_s(shape, config.num_threads),
    )
