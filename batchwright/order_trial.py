"""The order in which an engine starts rows; `auto` tries them on a pretended model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from batchwright import techniques
from batchwright.config import AUTO_ORDER, ResolvedConfig
from batchwright.exec.sim import LinearCost, StepCost
from batchwright.kv.groups import KVGroup
from batchwright.plan.auto_order import AutoOrder, Measured, Prediction, shared_tokens
from batchwright.plan.cost import CostModel
from batchwright.plan.order import JobFacts, OrderFunction, find_order, rates_of
from batchwright.plan.shape import ModelShape
from batchwright.plan.shared_keys import StepCosts
from batchwright.request import Request, SamplingParams, Task
from batchwright.sequence import Sequence
from batchwright.simulate import EngineSizes, Simulation

CROWDS = 4
"""A sample is run on all of the engine if it has so many times the rows that run at once; on a part
of it if not, lest its beginning and end, when few rows run, be all there is."""


def chosen_order(
    config: ResolvedConfig,
    groups: Seq[KVGroup],
    shape: ModelShape,
    measure: Callable[[], CostModel],
    *,
    is_told: bool = True,
) -> OrderFunction:
    """The order in which an engine with these settings starts rows.

    Args:
        shape: the model's.
        measure: what the model costs on this machine; asked at most once, if that pays.
        is_told: see `AutoOrder`.
    """
    if config.order != AUTO_ORDER:
        return find_order(config.order)
    from batchwright.exec.machine_cost import calibration_s, least_token_s

    def measured() -> Measured:
        start_s = time.perf_counter()
        cost = measure()
        engine = EngineSizes(
            groups=groups,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            length_predictor=config.length_predictor,
        )
        return Measured(Trial(engine, cost), rates_of(cost), time.perf_counter() - start_s)

    on_gpu = config.device == "cuda"
    return AutoOrder(
        measured,
        techniques.names("plan.orders"),
        measure_s=0.0 if on_gpu else calibration_s(shape, config.num_threads),
        token_s=least_token_s(shape, config.num_threads, on_gpu=on_gpu),
        is_told=is_told,
    )


class Trial:
    """Predicts the time of a job in an order, by running a sample of it.

    Args:
        engine: its order is left aside, and all rows of the sample are known from the start.
    """

    def __init__(self, engine: EngineSizes, cost: LinearCost | CostModel) -> None:
        self._engine, self._cost = engine, cost

    def __call__(self, job: JobFacts, order: OrderFunction, share: float = 1.0) -> Prediction:
        """Time of a job whose outputs are as long as expected, on a machine as busy as it was.

        Args:
            share: of the job's rows, that these are; the time is that of all.
        """
        sequences = list(sequences_of(job))
        longest = max((sequence.max_len for sequence in sequences), default=1)
        part = min(1.0, job.num_rows / (CROWDS * self._crowd(job))) if share < 1 else 1.0
        engine = replace(self._engine.scaled(part, longest), order=order, horizon=None)
        simulation = Simulation(iter(sequences), engine, self._costs())
        simulation.run()
        busy = self._cost.hardware.busy if isinstance(self._cost, CostModel) else 1.0
        return Prediction(busy * simulation.clock.now() / share, simulation.num_rounds)

    def _costs(self) -> StepCost:
        if isinstance(self._cost, CostModel):
            return StepCosts(self._cost, self._engine.block_size)
        return self._cost

    def _crowd(self, job: JobFacts) -> float:
        """Rows that run at once, by slots or by memory."""
        engine = self._engine
        kv_tokens = max(group.num_blocks for group in engine.groups) * engine.block_size
        per_row = (job.num_prompt_tokens + job.num_output_tokens / 2).mean()
        return max(min(engine.max_num_seqs, kv_tokens / max(per_row, 1)), 1)


def sequences_of(job: JobFacts) -> Iterator[Sequence]:
    """Rows that share what the job's rows share, of the same lengths."""
    for row, path in enumerate(shared_tokens(job.tree, np.arange(job.num_rows))):
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
        yield Sequence(
            request=request,
            order=row,
            sample_index=0,
            end_token_ids=(),
            noise_key=row,
            max_len=len(prompt) + num_output,
            token_ids=prompt,
        )
