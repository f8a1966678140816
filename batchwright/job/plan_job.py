"""plan_job: what a job will compute and take, before the model runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from batchwright.job.disk_space import bytes_written
from batchwright.job.formats.arranged_lines import Arrangement
from batchwright.job.journal import FinishedRows
from batchwright.job.plan_lengths import expected_shares
from batchwright.job.plan_rows import RowCounts, read_rows
from batchwright.job.rows import InputRow, RowError
from batchwright.job.runner import HORIZON_ROWS
from batchwright.job.validate import ParsedRow
from batchwright.kv.groups import KVGroup
from batchwright.limits import ModelLimits
from batchwright.plan.cost import CostModel
from batchwright.plan.estimate import (
    OutputLengths,
    Savings,
    Tokens,
    Work,
    count_tokens,
    count_work,
    find_savings,
    output_lengths,
)
from batchwright.plan.job_rows import TASKS, JobRows, RowColumns
from batchwright.plan.length_predictor import find_predictor
from batchwright.plan.order import OrderFunction
from batchwright.plan.orders.fcfs import fcfs
from batchwright.plan.prices import Billed, Price
from batchwright.prompt_cache.compose import PromptSchemas

if TYPE_CHECKING:
    from batchwright.opened_model import OpenedModel
    from batchwright.predict import Prediction
    from batchwright.simulate import EngineSizes

HOST_BYTES = 450_000_000
"""What Python, torch and the window of rows take beside weights, keys and values (measured)."""


SLOWEST = 1.5
"""The high end of the time allows for a machine that is so much slower than in the moments in which
it was measured: on one that others use, whole jobs and moments differ by as much."""


class Range(NamedTuple):
    """A number at the low, likely and high end of output lengths."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a job takes of this machine's memory.

    Attributes:
        weight_bytes: of the model.
        kv_bytes: at most for keys and values, taken as needed.
        kv_tokens: tokens that fit there, per KV group.
        rows_at_once: sequences of the likely length that run at once, if they share nothing.
        host_bytes: all of it.
        free_bytes: free now.
    """

    weight_bytes: int
    kv_bytes: int
    kv_tokens: tuple[int, ...]
    rows_at_once: int
    host_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What planning a job found.

    Attributes:
        counts: rows by what will become of them.
        num_tasks: prompts to compute or fold, by task; a row that is a list has several.
        num_folded: prompts answered by an identical one.
        output_share: of the allowed output tokens, that the likely end takes.
        share_is_measured: that is the share of rows that are finished.
        work: what is computed, at the three ends.
        predictions: simulated runs at the three ends.
        load_s: until the first step.
        bytes_written: to the disk.
        machine, num_threads: the processor, and how many threads of it are used.
        busy: seconds by the clock for one of the machine's own, when it was measured.
        plan_s: seconds that planning took.
    """

    counts: RowCounts
    num_tasks: dict[str, int]
    num_folded: int
    tokens: Tokens
    output_share: float
    share_is_measured: bool
    work: tuple[Work, ...]
    predictions: tuple[Prediction, ...]
    load_s: float
    memory: Memory
    bytes_written: Range
    machine: str
    num_threads: int
    busy: float
    plan_s: float

    @property
    def run_s(self) -> Range:
        """Seconds of running the rows: if others leave the machine, go on as they do, use more."""
        low, likely, high = (one.seconds for one in self.predictions)
        return Range(low, self.busy * likely, SLOWEST * self.busy * high)

    @property
    def total_s(self) -> Range:
        """With loading."""
        return Range(*(self.load_s + seconds for seconds in self.run_s))

    def cost(self, price: Price) -> Range:
        """Money: duplicates are paid for as others are, and what rows share is cached."""
        cached = self.tokens.num_shared
        ends = zip(self.tokens.output, self.total_s, strict=True)
        return Range(
            *(
                price.cost(Billed(self.tokens.num_prompt - cached, cached, output, seconds / 3600))
                for output, seconds in ends
            )
        )


def plan_job(
    rows: Iterator[InputRow | RowError],
    model: OpenedModel,
    *,
    arrangement: Arrangement | None = None,
    schemas: PromptSchemas | None = None,
    check: Callable[[ParsedRow], None] = lambda row: None,
    finished: FinishedRows | None = None,
    used_share: float | None = None,
    lengths: Mapping[str, int] = MappingProxyType({}),
) -> JobPlan:
    """Read all rows, count what they will compute, and predict how long it takes.

    Args:
        arrangement: of the rows; is told the order.
        schemas: those that rows may name in prompt_cache. Such rows are counted as whole prompts,
            which is more than is computed.
        check: a further check of each row, in input order; raises RequestError.
        finished: rows that an earlier run has finished.
        used_share: share of their allowed output tokens that those used.
        lengths: output tokens of some of them, by their id in the journal.
    Raises:
        InputError, ResourceError: the input cannot be read, or its tokens have no room.
    """
    start_s = time.perf_counter()
    cost = cost_model(model)
    engine, job_rows = engine_sizes(model, job_order(model, cost)), JobRows()
    if arrangement is not None:
        arrangement.order = engine.order
    with job_rows.store:
        counts = _read(rows, job_rows, model, engine, schemas, check, finished, lengths)
        columns = job_rows.columns()
        savings = find_savings(
            job_rows,
            columns,
            block_size=engine.block_size,
            horizon=HORIZON_ROWS,
            sharing=engine.prefix_sharing,
        )
        limits = ModelLimits(model.config.max_model_len, model.shape.vocab_size)
        shares = expected_shares(
            job_rows, columns, counts.ended, limits, find_predictor(model.config.length_predictor)
        )
        output = output_lengths(columns, used_share if shares is None else shares)
        work, predictions = _predict(job_rows, columns, savings, output, engine, cost)
    tokens = count_tokens(columns, savings, output)
    return JobPlan(
        counts=counts,
        num_tasks={task.value: int((columns.task == i).sum()) for i, task in enumerate(TASKS)},
        num_folded=int(savings.folded.sum()),
        tokens=tokens,
        output_share=output.share,
        share_is_measured=output.is_measured,
        work=work,
        predictions=predictions,
        load_s=_load_s(model),
        memory=_memory(model, engine, columns, output),
        bytes_written=Range(*(bytes_written(len(columns), output) for output in tokens.output)),
        machine=cost.hardware.name,
        num_threads=cost.hardware.num_threads,
        busy=cost.hardware.busy,
        plan_s=time.perf_counter() - start_s,
    )


def read_job_rows(
    rows: Iterator[InputRow | RowError],
    model: OpenedModel,
    *,
    check: Callable[[ParsedRow], None] = lambda row: None,
    schemas: PromptSchemas | None = None,
) -> tuple[RowCounts, JobRows]:
    """All rows of a job; whose token store is to be closed by who calls this.

    Args:
        schemas: see `plan_job`.
    """
    job_rows = JobRows()
    try:
        engine = engine_sizes(model, fcfs)
        return _read(rows, job_rows, model, engine, schemas, check, None, {}), job_rows
    except BaseException:
        job_rows.store.close()
        raise


def job_order(model: OpenedModel, cost: CostModel) -> OrderFunction:
    """In which order the engine that will run the model starts rows; `cost` is for `auto`."""
    from batchwright.order_trial import chosen_order

    return chosen_order(model.config, model.groups, model.shape, lambda: cost)


def engine_sizes(model: OpenedModel, order: OrderFunction) -> EngineSizes:
    """The sizes of the engine that will run the model. Replicas are pretended to be one engine that
    is as many times as large."""
    from batchwright.simulate import EngineSizes

    config = model.config
    size = config.data_parallel_size
    return EngineSizes(
        groups=[KVGroup(group.window, size * group.num_blocks) for group in model.groups],
        block_size=config.block_size,
        max_num_seqs=size * config.max_num_seqs,
        max_num_batched_tokens=size * config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        prefix_sharing=config.prefix_sharing,
        horizon=HORIZON_ROWS,
        order=order,
        length_predictor=config.length_predictor,
    )


def cost_model(model: OpenedModel) -> CostModel:
    """What the model costs on this machine, measured now."""
    from batchwright.exec.machine_cost import machine_cost
    from batchwright.weights.forms import stored_forms

    checkpoint = model.checkpoint
    return machine_cost(checkpoint.config, model.shape, model.config, stored_forms(checkpoint))


def _read(
    rows: Iterator[InputRow | RowError],
    into: JobRows,
    model: OpenedModel,
    engine: EngineSizes,
    schemas: PromptSchemas | None,
    check: Callable[[ParsedRow], None],
    finished: FinishedRows | None,
    lengths: Mapping[str, int],
) -> RowCounts:
    from batchwright.structured.compile import GrammarCompiler

    vocab_size = model.shape.vocab_size
    grammars = GrammarCompiler(model.tokenizer, vocab_size)
    try:
        return read_rows(
            rows,
            into,
            model.tokenizer,
            ModelLimits(model.config.max_model_len, vocab_size),
            grammars=grammars,
            schemas=schemas,
            check=check,
            finished=finished,
            lengths=lengths,
            # a row is in one replica
            fits=lambda num_tokens: (
                engine.most_at_once(num_tokens) >= model.config.data_parallel_size
            ),
        )
    finally:
        grammars.close()


def _predict(
    rows: JobRows,
    columns: RowColumns,
    savings: Savings,
    lengths: OutputLengths,
    engine: EngineSizes,
    cost: CostModel,
) -> tuple[tuple[Work, ...], tuple[Prediction, ...]]:
    """Work and simulated runs at the three ends of output lengths."""
    from batchwright.predict import predict

    computed = np.flatnonzero(~savings.folded)
    work, predictions = [], []
    for output in (lengths.low, lengths.likely, lengths.high):
        one = count_work(columns, savings, output, cost.shape)
        work.append(one)
        predictions.append(
            predict(
                rows,
                columns,
                output,
                computed=computed,
                engine=engine,
                cost=cost,
                total_work_s=cost.work_s(
                    one.num_tokens, one.num_keys, one.num_logits, one.num_draws
                ),
            )
        )
    return tuple(work), tuple(predictions)


def _load_s(model: OpenedModel) -> float:
    from batchwright.exec.load_time import load_s

    return load_s(model.checkpoint)


def _memory(
    model: OpenedModel, engine: EngineSizes, columns: RowColumns, lengths: OutputLengths
) -> Memory:
    pairs = zip(model.shape.attention, engine.groups, strict=True)
    block_bytes = model.kv_element_bytes * engine.block_size
    kv_bytes = round(sum(one.kv_elements * group.num_blocks * block_bytes for one, group in pairs))
    likely = columns.num_prompt + lengths.likely
    mean = int(likely.mean()) if len(columns) else 0
    size = model.config.data_parallel_size
    num_processes = model.config.tensor_parallel_size * size + (size > 1)  # replicas have a parent
    return Memory(
        weight_bytes=model.weight_bytes,
        kv_bytes=kv_bytes,
        kv_tokens=tuple(group.num_blocks * engine.block_size for group in engine.groups),
        rows_at_once=engine.rows_at_once(mean),
        host_bytes=model.weight_bytes + kv_bytes + HOST_BYTES * num_processes,
        free_bytes=model.free_memory_bytes,
    )
