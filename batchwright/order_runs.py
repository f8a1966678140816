"""One job in several orders on a pretended machine: what each took, and its course over time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from batchwright.plan.cost import CostModel
from batchwright.plan.job_rows import JobRows, RowColumns
from batchwright.plan.job_tree import build_job_tree
from batchwright.plan.order import OrderFunction
from batchwright.plan.shared_keys import StepCosts
from batchwright.predict import families
from batchwright.sched.work import work_flops
from batchwright.simulate import EngineSizes, Simulation
from batchwright.step import EqualSteps, Step

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

END_TOKEN = 1

NUM_INTERVALS = 150
"""Points of a course."""


@dataclass(frozen=True, slots=True)
class Course:
    """A run over time, in intervals of equal length; all arrays are [num_intervals].

    Attributes:
        interval_s: length of one.
        prompt_tokens_per_s, output_tokens_per_s: tokens computed, by what they are.
        compute_use: FLOPs, as a share of what the machine's best product would do.
        bandwidth_use: bytes of weights, keys and values, as a share of what plain reading would do.
        kv_use: blocks in use of the fullest KV group, as a share.
        num_running: sequences that run.
    """

    interval_s: float
    prompt_tokens_per_s: list[float]
    output_tokens_per_s: list[float]
    compute_use: list[float]
    bandwidth_use: list[float]
    kv_use: list[float]
    num_running: list[float]


@dataclass(frozen=True, slots=True)
class OrderRun:
    """A simulated run.

    Attributes:
        order: its name.
        tokens_per_s: prompt and output tokens of all rows, whether computed or shared, per second.
        prefill_tokens: prompt tokens computed, first and again.
        unique_tokens: the fewest that any order must compute: distinct blocks once.
        peak_kv_use: share of the blocks of the fullest KV group.
        peak_kv_tokens: the same in tokens.
    """

    order: str
    seconds: float
    tokens_per_s: float
    output_tokens_per_s: float
    prefill_tokens: int
    unique_tokens: int
    recomputed_tokens: int
    steps: int
    rounds: int
    preemptions: int
    max_running: int
    peak_kv_use: float
    peak_kv_tokens: int
    compute_use: float
    bandwidth_use: float
    course: Course

    def numbers(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


def run_orders(
    rows: JobRows,
    columns: RowColumns,
    output: Int64Array,
    orders: Iterable[tuple[str, OrderFunction]],
    *,
    engine: EngineSizes,
    cost: CostModel,
    chosen: Int64Array | None = None,
) -> list[OrderRun]:
    """Simulate a job once in each order; the engine's own is left aside.

    Args:
        output: [num_rows] true output tokens of each sequence, which no order knows.
        chosen: ascending, the rows that are computed; None: all.
    """
    chosen = np.arange(len(columns)) if chosen is None else chosen
    job = _Job(rows, columns, output, chosen)
    job.num_unique_tokens = unique_prompt_tokens(rows, chosen, engine.block_size)
    return [_run(name, job, replace(engine, order=order), cost) for name, order in orders]


@dataclass(slots=True)
class _Job:
    rows: JobRows
    columns: RowColumns
    output: Int64Array
    chosen: Int64Array
    num_unique_tokens: int = 0


def unique_prompt_tokens(rows: JobRows, chosen: Int64Array, block_size: int) -> int:
    """Prompt tokens to compute if every distinct block is computed once.

    A prompt that ends with a shared block computes its last token again, for its logits.
    """
    if not len(chosen):
        return 0
    tokens, offsets = rows.store.tokens(), rows.store.offsets
    if len(chosen) < len(rows):
        tokens = np.concatenate([tokens[offsets[row] : offsets[row + 1]] for row in chosen])
        offsets = np.concatenate(([0], np.cumsum(np.diff(offsets)[chosen])))
    lengths = np.diff(offsets)
    tree = build_job_tree(tokens, offsets).in_blocks(block_size)
    tails = int((lengths % block_size).sum())
    whole = np.bincount(tree.node_of_row[lengths % block_size == 0], minlength=tree.num_nodes)
    again = int(np.maximum(whole - 1, 0).sum())  # one of those that end here computes the block
    return tree.num_distinct_tokens() + tails + again


def _run(name: str, job: _Job, engine: EngineSizes, cost: CostModel) -> OrderRun:
    watcher, columns, output = _Watcher(cost, engine.block_size), job.columns, job.output
    run = Simulation(
        families(job.rows, columns, columns.most_output, job.chosen, end_token_ids=(END_TOKEN,)),
        engine,
        watcher,
        lambda new: int(output[new.noise_key]),
        watch=watcher.note,
    )
    run.run()
    stats, seconds = run.scheduler.stats, run.clock.now()
    num_output = int((columns.num_samples * output).sum())
    num_tokens = int((columns.num_samples * columns.num_prompt).sum()) + num_output
    group = max(engine.groups, key=lambda group: group.num_blocks)
    return OrderRun(
        order=name,
        seconds=seconds,
        tokens_per_s=num_tokens / max(seconds, 1e-9),
        output_tokens_per_s=num_output / max(seconds, 1e-9),
        prefill_tokens=stats.work.num_prompt_tokens,
        unique_tokens=job.num_unique_tokens,
        recomputed_tokens=stats.num_recomputed_tokens,
        steps=stats.num_steps,
        rounds=run.num_rounds,
        preemptions=stats.num_preemptions,
        max_running=run.max_running,
        peak_kv_use=run.peak_kv_fraction,
        peak_kv_tokens=round(run.peak_kv_fraction * group.num_blocks * engine.block_size),
        compute_use=watcher.compute_use,
        bandwidth_use=watcher.bandwidth_use,
        course=watcher.course(),
    )


class _Watcher:
    """Charges a run's Steps, and notes after each round what has been done until then."""

    def __init__(self, cost: CostModel, block_size: int) -> None:
        self._cost, self._costs = cost, StepCosts(cost, block_size)
        self._num_bytes = 0.0
        names = ("seconds", "prompt", "output", "flops", "bytes", "kv_s", "running_s")
        self._columns = {name: array("d", [0.0]) for name in names}

    def seconds(self, step: Step) -> float:
        shared = self._costs.follow(step)
        self._num_bytes += self._cost.num_bytes(step, shared)
        return self._cost.seconds(step, shared)

    def equal_seconds(self, steps: EqualSteps) -> float:
        shared = self._costs.follow_equal(steps)
        self._num_bytes += self._cost.equal_bytes(steps, shared)
        return self._cost.equal_seconds(steps, shared)

    def note(self, run: Simulation) -> None:
        """A round is over; rows that ended with it have left."""
        work, now_s = run.scheduler.stats.work, run.clock.now()
        keys = [a + b for a, b in zip(work.num_prompt_keys, work.num_output_keys, strict=True)]
        num_tokens = work.num_prompt_tokens + work.num_output_tokens
        num_logits = work.num_logits + work.num_scored
        length_s = now_s - self._columns["seconds"][-1]
        books = run.scheduler.books
        used = max(1 - t.pool.num_free / t.pool.num_blocks for t in books.tables)
        values = {
            "seconds": now_s,
            "prompt": work.num_prompt_tokens,
            "output": work.num_output_tokens,
            "flops": sum(work_flops(self._cost.shape, num_tokens, keys, num_logits)),
            "bytes": self._num_bytes,
            "kv_s": self._columns["kv_s"][-1] + length_s * used,
            "running_s": self._columns["running_s"][-1] + length_s * books.slots.num_running,
        }
        for name, value in values.items():
            self._columns[name].append(value)

    @property
    def compute_use(self) -> float:
        """Of the whole run."""
        done, seconds = self._columns["flops"][-1], self._columns["seconds"][-1]
        return done / max(seconds, 1e-9) / self._cost.hardware.ceiling_flops_per_s

    @property
    def bandwidth_use(self) -> float:
        """Of the whole run."""
        done, seconds = self._columns["bytes"][-1], self._columns["seconds"][-1]
        return done / max(seconds, 1e-9) / self._cost.hardware.memory_bytes_per_s

    def course(self) -> Course:
        """What was noted, by intervals of equal length."""
        hardware, times = self._cost.hardware, np.array(self._columns["seconds"])
        edges = np.linspace(0, times[-1], NUM_INTERVALS + 1)
        interval_s = float(edges[1]) or 1.0

        def rate(name: str, ceiling: float = 1.0) -> list[float]:
            done = np.interp(edges, times, np.array(self._columns[name]))
            rates: list[float] = (np.diff(done) / interval_s / ceiling).tolist()
            return rates

        return Course(
            interval_s=interval_s,
            prompt_tokens_per_s=rate("prompt"),
            output_tokens_per_s=rate("output"),
            compute_use=rate("flops", hardware.ceiling_flops_per_s),
            bandwidth_use=rate("bytes", hardware.memory_bytes_per_s),
            kv_use=rate("kv_s"),
            num_running=rate("running_s"),
        )
