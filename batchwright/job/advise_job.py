"""advise_job: which settings, how much memory, how many devices a job should be given, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from batchwright import techniques
from batchwright.arrivals import poisson_arrivals, simulate_arrivals
from batchwright.config import ResolvedConfig
from batchwright.errors import ConfigError
from batchwright.job.advice import (
    Advice,
    DeviceAdvice,
    MemoryAdvice,
    Question,
    QueueAdvice,
)
from batchwright.job.plan_job import HOST_BYTES, cost_model, read_job_rows
from batchwright.job.rows import InputRow, RowError
from batchwright.job.runner import HORIZON_ROWS
from batchwright.job.trials import KnownJob, Trials
from batchwright.job.validate import ParsedRow
from batchwright.plan.advise.batch_queue import (
    dynamic_batch,
    elastic_batch,
    fixed_batch_sojourn,
    mean_sojourn_bound,
)
from batchwright.plan.advise.batch_size import BATCH_SIZES, ProfilePoint, best_batch
from batchwright.plan.advise.devices import (
    MAX_DEVICES,
    REPLICA_SIZES,
    Layout,
    smallest_layout,
)
from batchwright.plan.advise.knobs import Knobs, best_trial, runners_up, search
from batchwright.plan.advise.replicas import num_replicas, replica_gain
from batchwright.plan.advise.single_queue import (
    ClippedQueue,
    Service,
    choose_limit,
    clipped_queue,
    length_tail,
)
from batchwright.plan.advise.step_costs import (
    activation_bytes,
    batch_service,
    decode_mix,
    decode_step,
    prompt_s,
)
from batchwright.plan.cost import CostModel
from batchwright.plan.estimate import find_savings, output_lengths
from batchwright.plan.hardware import (
    USABLE_SHARE,
    DeviceProfile,
    device_hardware,
    kv_memory_bytes,
)
from batchwright.plan.job_rows import TASKS
from batchwright.plan.shape import ModelShape
from batchwright.plan.shared_keys import StepCosts
from batchwright.request import Task

if TYPE_CHECKING:
    from batchwright.opened_model import OpenedModel
    from batchwright.prompt_cache.compose import PromptSchemas

BUDGETS = (128, 256, 512, 1024, 2048, 4096, 8192)
"""Token budgets of a Step that are tried."""

KV_MARGIN = 0.1
"""Memory for keys and values beyond the most that the simulation used."""

WAIT_WORTH = 0.27
"""A second of waiting is worth this share of the tokens that one sequence generates in it. With it
the example of arXiv:2407.05347 (44 tokens per second) has its reported optimum of 1,600 tokens."""

BLOCK_SIZES = (32, 64, 128)
"""Tokens of a block that are tried."""

NUM_REQUESTS = 400
"""Requests of a simulated load."""

NUM_LIMITS = 40
"""Token limits that are looked at."""


class Advisor:
    """Reads a job and answers questions about it.

    Args:
        check: a further check of each row, in input order; raises RequestError.
        schemas: those that rows may name in prompt_cache; such rows are counted as whole prompts.
    Raises:
        InputError, ResourceError: the input cannot be read, or its tokens have no room.
        ConfigError: no row can run, or the weights do not fit on the device.
    """

    def __init__(
        self,
        rows: Iterator[InputRow | RowError],
        model: OpenedModel,
        question: Question,
        *,
        check: Callable[[ParsedRow], None] = lambda row: None,
        schemas: PromptSchemas | None = None,
    ) -> None:
        self.model, self.question = model, question
        self.counts, self._rows = read_job_rows(rows, model, check=check, schemas=schemas)
        self._costs: dict[int, CostModel] = {}
        self._on_devices: dict[int, Trials] = {}
        try:
            self._know()
        except BaseException:
            self.close()
            raise

    def _know(self) -> None:
        """Look at what was read, and at what it is to run on."""
        columns = self._rows.columns()
        if not len(columns):
            raise ConfigError("no row of the input can run, so there is nothing to advise on")
        savings = find_savings(
            self._rows,
            columns,
            block_size=self.model.config.block_size,
            horizon=HORIZON_ROWS,
            sharing=self.model.config.prefix_sharing,
        )
        self._lengths = output_lengths(columns, None)
        self.job = KnownJob(self._rows, columns, savings, self._lengths.likely)
        self.num_devices = self._fewest_devices()
        self.simulation = self._simulation(self.num_devices)
        if self.simulation.trial(self.simulation.own) is None:
            longest = int((columns.num_prompt + self._lengths.likely).max())
            raise ConfigError(
                f"the longest row takes {longest} tokens of keys and values, for which there is no "
                "room; give them more memory, or use more devices"
            )

    def advise(self) -> Advice:
        """Answer all that was asked.

        Raises:
            ConfigError: a limit cannot be kept.
        """
        question, simulation = self.question, self.simulation
        profile = simulation.profile()
        best = best_batch(profile, slo_s=question.slo_s)
        trials = search(simulation.own, self._choices(), simulation.trial, question.slo_s)
        pick = best_trial(trials, question.slo_s)
        hardware = simulation.cost(simulation.own.num_threads).hardware.name
        return Advice(
            counts=self.counts,
            hardware=hardware,
            device=hardware if question.device is None else question.device.name,
            num_tokens=self.job.tokens_of(np.arange(len(self.job.columns))),
            output_share=self._lengths.share,
            trials=tuple(trials),
            pick=pick,
            contenders=tuple(runners_up(trials, question.slo_s, 2)),
            profile=tuple(profile),
            memory=self._memory(best),
            queue=self._queue(pick.knobs),
            devices=self._devices(pick.knobs),
        )

    def close(self) -> None:
        """Let go of the rows' tokens."""
        self._rows.store.close()

    def __enter__(self) -> Advisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fewest_devices(self) -> int:
        """Devices that one engine needs at least, to hold the weights; or those that are given."""
        if self.question.replica_size is not None:
            return self.question.replica_size
        for size in REPLICA_SIZES[:-1]:
            try:
                self._simulation(size)
            except ConfigError:
                continue
            return size
        return REPLICA_SIZES[-1]

    # Engines ----------------------------------------------------------------------------------

    def _simulation(self, replica_size: int) -> Trials:
        """Engines on this machine, or on so many devices that share a model."""
        if replica_size not in self._on_devices:
            self._on_devices[replica_size] = self._new_simulation(replica_size)
        return self._on_devices[replica_size]

    def _new_simulation(self, replica_size: int) -> Trials:
        model, device = self.model, self.question.device
        if device is None:
            return Trials(self.job, model.shape, model.config, self._cost, model.kv_element_bytes)
        shape = self.question.model_shape or model.shape
        element_bytes = self._element_bytes
        hardware = device_hardware(device, shape, element_bytes, num_devices=replica_size)
        cost = CostModel(shape, hardware, element_bytes, element_bytes)
        config = self._device_config(device, shape, replica_size)
        return Trials(self.job, shape, config, lambda _: cost, element_bytes)

    def _device_config(
        self, device: DeviceProfile, shape: ModelShape, replica_size: int
    ) -> ResolvedConfig:
        config = self.model.config
        free = kv_memory_bytes(device, shape, self._element_bytes, num_devices=replica_size)
        given = "kv_cache_bytes" in self.question.fixed
        kv_bytes = min(config.kv_cache_bytes, int(free)) if given else int(free)
        return dataclasses.replace(config, kv_cache_bytes=kv_bytes, num_threads=1)

    @property
    def _element_bytes(self) -> int:
        """Of weights, keys and values on a device: 2, unless 4 were asked for."""
        asked = "dtype" in self.question.fixed and self.model.config.dtype == "float32"
        return 4 if asked else 2

    def _cost(self, num_threads: int) -> CostModel:
        """This machine, measured once for each number of threads."""
        if num_threads not in self._costs:
            config = dataclasses.replace(self.model.config, num_threads=num_threads)
            self._costs[num_threads] = cost_model(dataclasses.replace(self.model, config=config))
        return self._costs[num_threads]

    def _choices(self) -> dict[str, Sequence[Any]]:
        """Values of the settings that are searched."""
        own, num_sequences = self.simulation.own, self.job.num_sequences
        sizes = {size for size in BATCH_SIZES if size < 2 * num_sequences} | {own.max_num_seqs}
        most_tokens = max(self.job.tokens_of(self.job.computed), 1)
        budgets = {size for size in BUDGETS if size < 2 * most_tokens}
        choices: dict[str, Sequence[Any]] = {
            "order": techniques.names("plan.orders"),
            "max_num_seqs": sorted(sizes),
            "max_num_batched_tokens": sorted(budgets | {own.max_num_batched_tokens}),
        }
        if self.question.device is None and own.num_threads > 1:
            choices["num_threads"] = (own.num_threads // 2, own.num_threads)
        choices["block_size"] = BLOCK_SIZES  # last: what is gained by it is little
        return {name: found for name, found in choices.items() if name not in self.question.fixed}

    # Answers ----------------------------------------------------------------------------------

    def _memory(self, best: ProfilePoint) -> MemoryAdvice:
        simulation, device = self.simulation, self.question.device
        own, shape = simulation.own, simulation.shape
        cost = simulation.cost(own.num_threads)
        budget = max(own.max_num_batched_tokens, best.batch_size)
        itemsize = self.model.dtype.itemsize if device is None else self._element_bytes
        activations = activation_bytes(shape, budget, best.batch_size, itemsize)
        block_size = simulation.config.block_size
        kv_tokens = math.ceil(best.kv_tokens * (1 + KV_MARGIN) / block_size) * block_size
        engine = simulation.engine(own)
        assert engine is not None, "these settings were simulated before"
        kv_tokens = min(kv_tokens, max(one.num_blocks for one in engine.groups) * block_size)
        kv_bytes = math.ceil(kv_tokens * simulation.kv_token_bytes)
        weights = shape.num_params * self._element_bytes
        if device is None:
            weights = self.model.weight_bytes
            activations += HOST_BYTES
            memory = self.model.free_memory_bytes
        else:
            memory = int(self.num_devices * device.memory_bytes * USABLE_SHARE)
        replicas = num_replicas(
            memory, weight_bytes=weights, activation_bytes=activations, kv_bytes=kv_bytes
        )
        mix = decode_mix(cost, best.batch_size, self._mean_context())
        return MemoryAdvice(
            best,
            kv_tokens,
            kv_bytes,
            weights,
            activations,
            memory,
            replicas,
            *(replica_gain(mix, max(replicas, 1), overlap) for overlap in (0.0, 1.0)),
        )

    def _mean_context(self) -> int:
        """Tokens before the one that is decoded, on average."""
        columns, output = self.job.columns, self.job.output
        weights = np.maximum(output, 1)
        return int(((columns.num_prompt + output / 2) * weights).sum() / weights.sum())

    def _queue(self, knobs: Knobs) -> QueueAdvice | None:
        rate = self.question.arrivals_per_s
        if rate is None:
            return None
        job = self.job
        rows = np.flatnonzero((job.columns.task == TASKS.index(Task.GENERATE)) & (job.output > 0))
        if not len(rows):
            raise ConfigError("no row generates tokens, so there is no queue to look at")
        cost, context = self.simulation.cost(knobs.num_threads), self._mean_context()
        budget, lengths = knobs.max_num_batched_tokens, job.output[rows]
        num_prompt = max(int(job.columns.num_prompt[rows].mean()), 1)
        tail, most = length_tail(lengths), int(lengths.max())
        alone = Service(
            cost.seconds(decode_step(1, context, len(cost.shape.attention))),
            prompt_s(cost, num_prompt, budget),
        )
        limits = sorted({math.ceil(most * i / NUM_LIMITS) for i in range(1, NUM_LIMITS + 1)})
        service = batch_service(
            cost,
            num_prompt=num_prompt,
            context=context,
            num_rows=knobs.max_num_seqs,
            budget=budget,
        )
        sizes = [size for size in BATCH_SIZES if size <= knobs.max_num_seqs]
        fixed_s, size = min((fixed_batch_sojourn(service, tail, rate, b), b) for b in sizes)
        chosen = rows[np.arange(NUM_REQUESTS) % len(rows)]
        # A server starts rows as they come, unless it is told otherwise.
        order = knobs.order if "order" in self.question.fixed else "fcfs"
        engine = self.simulation.engine(dataclasses.replace(knobs, order=order))
        assert engine is not None, "these settings were simulated before"
        tokens, offsets = job.rows.store.tokens(), job.rows.store.offsets
        run = simulate_arrivals(
            [tokens[offsets[row] : offsets[row + 1]] for row in chosen],
            job.output[chosen].tolist(),
            poisson_arrivals(NUM_REQUESTS, rate, seed=0),
            engine,
            StepCosts(cost, engine.block_size),
        )
        return QueueAdvice(
            rate,
            tuple(clipped_queue(tail, rate, alone, limit) for limit in limits),
            _best_limit(tail, rate, alone, limits),
            mean_sojourn_bound(dynamic_batch(service, most), rate),
            mean_sojourn_bound(elastic_batch(service, most, float(lengths.mean())), rate),
            size,
            fixed_s,
            float(run.sojourn_s.mean()),
            float(np.quantile(run.sojourn_s, 0.95)),
            run.busy_fraction,
        )

    def _devices(self, knobs: Knobs) -> DeviceAdvice | None:
        question = self.question
        targets = [question.target_s] if question.target_s is not None else []
        if question.target_tokens_per_s is not None:
            num_tokens = self.job.tokens_of(np.arange(len(self.job.columns)))
            targets.append(num_tokens / question.target_tokens_per_s)
        if not targets:
            return None
        most = min(MAX_DEVICES, len(self.job.computed))
        found, tried = smallest_layout(
            lambda layout: self._layout_s(layout, knobs), min(targets), most=most
        )
        return DeviceAdvice(min(targets), found, tuple(tried))

    def _layout_s(self, layout: Layout, knobs: Knobs) -> float | None:
        if self.question.device is None and layout.replica_size > 1:
            return None  # a machine is not divided
        if self.question.replica_size not in (None, layout.replica_size):
            return None
        try:
            simulation = self._simulation(layout.replica_size)
        except ConfigError:  # the weights do not fit
            return None
        trial = simulation.trial(knobs, layout.num_replicas)
        return None if trial is None else trial.seconds


def _best_limit(
    tail: Any, rate: float, alone: Service, limits: Sequence[int]
) -> ClippedQueue | None:
    try:
        return choose_limit(
            tail, rate, alone, limits, tokens_per_s_waited=WAIT_WORTH / alone.token_s
        )
    except ConfigError:
        return None  # one at a time is the paper's view; an engine that batches may keep up
