"""Trials: what settings make of a job, by simulation. Advice meets `predict` here only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from batchwright.config import ResolvedConfig
from batchwright.errors import ConfigError
from batchwright.job.runner import HORIZON_ROWS
from batchwright.order_trial import chosen_order
from batchwright.plan.advise.batch_size import BATCH_SIZES, ProfilePoint
from batchwright.plan.advise.knobs import Knobs, Trial
from batchwright.plan.cost import CostModel, SharedReads
from batchwright.plan.estimate import Int64Array, Savings, count_work, find_savings
from batchwright.plan.job_rows import JobRows, RowColumns
from batchwright.plan.shape import ModelShape
from batchwright.predict import predict
from batchwright.simulate import EngineSizes
from batchwright.step import EqualSteps, Step


class MeteredCost:
    """A cost model that adds up how long the rows of its Steps waited for their tokens.

    Attributes:
        waited_s: seconds of the Steps, each counted for every token that it drew.
        num_drawn: these tokens.
    """

    def __init__(self, cost: CostModel) -> None:
        self.cost, self.shape, self.hardware = cost, cost.shape, cost.hardware
        self.waited_s, self.num_drawn = 0.0, 0

    @property
    def token_s(self) -> float:
        """Mean seconds between two tokens of a sequence."""
        return self.waited_s / max(self.num_drawn, 1)

    @property
    def rows_per_load(self) -> int:
        """As that of the cost model."""
        return self.cost.rows_per_load

    def seconds(self, step: Step, shared: Sequence[SharedReads] = ()) -> float:
        """Time of a Step."""
        seconds = self.cost.seconds(step, shared)
        self.waited_s += seconds * len(step.sample_tokens)
        self.num_drawn += len(step.sample_tokens)
        return seconds

    def equal_seconds(self, steps: EqualSteps, shared: Sequence[SharedReads] = ()) -> float:
        """Time of equal Steps, all of them."""
        seconds = self.cost.equal_seconds(steps, shared)
        self.waited_s += seconds * len(steps.slots)
        self.num_drawn += steps.num_steps * len(steps.slots)
        return seconds

    def work_s(self, *counts: Any) -> float:
        """As that of the cost model."""
        return self.cost.work_s(*counts)


@dataclass(frozen=True, eq=False)
class KnownJob:
    """Rows with output lengths.

    Attributes:
        savings: in blocks of the size that one has.
        output: [num_rows] output tokens of each sequence.
    """

    rows: JobRows
    columns: RowColumns
    savings: Savings
    output: Int64Array

    @property
    def num_sequences(self) -> int:
        """Sequences that are computed."""
        return int(self.columns.num_samples[~self.savings.folded].sum())

    def tokens_of(self, rows: Int64Array) -> int:
        """Prompt and output tokens of some rows, shared or not."""
        columns = self.columns.at(rows)
        return int((columns.num_prompt + self.output[rows] * columns.num_samples).sum())

    @property
    def computed(self) -> Int64Array:
        """Indices of the rows that are computed."""
        return np.flatnonzero(~self.savings.folded)

    def first_part(self, num_parts: int) -> Int64Array:
        """Indices of the rows of the first of so many parts with the same number of tokens."""
        computed = self.computed
        columns, output = self.columns.at(computed), self.output[computed]
        tokens = np.cumsum(columns.num_computable + output * columns.num_samples)
        end = int(np.searchsorted(tokens, tokens[-1] / num_parts)) + 1 if len(tokens) else 0
        return computed[:end]


class Trials:
    """Runs a job on pretended engines, each setting once.

    Args:
        config: settings, of which Knobs are replaced.
        cost: what Steps cost with so many threads.
        kv_element_bytes: of one element of keys and values.
    """

    def __init__(
        self,
        job: KnownJob,
        shape: ModelShape,
        config: ResolvedConfig,
        cost: Callable[[int], CostModel],
        kv_element_bytes: float,
    ) -> None:
        self.job, self.shape, self.config, self.cost = job, shape, config, cost
        self.kv_token_bytes = shape.kv_elements_per_token() * kv_element_bytes
        self._kv_element_bytes = kv_element_bytes
        self._seen: dict[tuple[Knobs, int], Trial | None] = {}
        self._savings = {config.block_size: job.savings}

    @property
    def own(self) -> Knobs:
        """The settings as they are."""
        config = self.config
        return Knobs(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            order=config.order,
            num_threads=config.num_threads,
            block_size=config.block_size,
        )

    def trial(self, knobs: Knobs, num_parts: int = 1) -> Trial | None:
        """What some settings are predicted to give; None if they are not possible.

        Args:
            num_parts: the job is divided into so many, of which one is run.
        """
        key = knobs, num_parts
        if key not in self._seen:
            self._seen[key] = self.trial_of(knobs, self.job.first_part(num_parts))
        return self._seen[key]

    def trial_of(self, knobs: Knobs, computed: Int64Array) -> Trial | None:
        """The same for some rows only: ascending indices, none of them folded."""
        engine = self.engine(knobs)
        return None if engine is None else self._run(knobs, engine, computed)

    def profile(self) -> list[ProfilePoint]:
        """Throughput, latency and memory by batch size, up to one that holds the whole job."""
        points = []
        for size in BATCH_SIZES:
            budget = max(self.own.max_num_batched_tokens, size)
            knobs = dataclasses.replace(self.own, max_num_seqs=size, max_num_batched_tokens=budget)
            trial = self.trial(knobs)
            if trial is not None:
                points.append(
                    ProfilePoint(size, trial.tokens_per_s, trial.token_s, trial.kv_tokens)
                )
            if size >= self.job.num_sequences:
                break
        return points

    def engine(self, knobs: Knobs) -> EngineSizes | None:
        """The sizes of an engine with these settings; None if there can be none."""
        config = dataclasses.replace(self.config, **dataclasses.asdict(knobs))
        if config.max_num_batched_tokens < config.max_num_seqs:
            return None
        attention = self.shape.attention
        block_bytes = [
            math.ceil(one.kv_elements * config.block_size * self._kv_element_bytes)
            for one in attention
        ]
        try:
            groups = config.kv_groups([one.window for one in attention], block_bytes)
        except ConfigError:
            return None
        return EngineSizes(
            groups=groups,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            prefix_sharing=config.prefix_sharing,
            horizon=HORIZON_ROWS,
            order=chosen_order(
                config, groups, self.shape, lambda: self.cost(config.num_threads), is_told=False
            ),
            length_predictor=config.length_predictor,
        )

    def _savings_in(self, block_size: int) -> Savings:
        """What the job saves in blocks of this size."""
        if block_size not in self._savings:
            self._savings[block_size] = find_savings(
                self.job.rows,
                self.job.columns,
                block_size=block_size,
                horizon=HORIZON_ROWS,
                sharing=self.config.prefix_sharing,
            )
        return self._savings[block_size]

    def _run(self, knobs: Knobs, engine: EngineSizes, computed: Int64Array) -> Trial | None:
        job, cost = self.job, self.cost(knobs.num_threads)
        longest = job.columns.num_prompt[computed] + job.output[computed]
        if len(computed) and not engine.most_at_once(int(longest.max())):
            return None
        metered = MeteredCost(cost)
        columns, output = job.columns.at(computed), job.output[computed]
        whole = self._savings_in(knobs.block_size)
        savings = Savings(whole.folded[computed], whole.cached[computed], 0)
        work = count_work(columns, savings, output, self.shape)
        prediction = predict(
            job.rows,
            job.columns,
            job.output,
            computed=computed,
            engine=engine,
            cost=cast(CostModel, metered),
            total_work_s=cost.work_s(
                work.num_tokens, work.num_keys, work.num_logits, work.num_draws
            ),
        )
        num_blocks = max(group.num_blocks for group in engine.groups)
        return Trial(
            knobs,
            prediction.seconds,
            metered.token_s,
            job.tokens_of(computed) / max(prediction.seconds, 1e-12),
            round(prediction.peak_kv_fraction * num_blocks) * engine.block_size,
            prediction.max_running,
        )
