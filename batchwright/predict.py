"""How long rows will take: the real scheduler on a pretended model and a virtual clock.

A long job is simulated in part: stretches of its rows, evenly spread. What was simulated until the
last row had started is scaled up by the work it did (`CostModel.work_s`); the drain after it, when
fewer and fewer rows run, is added once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from batchwright.clock import VirtualClock
from batchwright.exec.sim import SimExecutor
from batchwright.kv.groups import KVGroup, blocks_per_sequence
from batchwright.plan.cost import CostModel
from batchwright.plan.job_rows import TASKS, Int64Array, JobRows, RowColumns
from batchwright.plan.order import OrderFunction
from batchwright.plan.orders.fcfs import fcfs
from batchwright.plan.shared_keys import StepCosts
from batchwright.request import Request, SamplingParams, Task
from batchwright.sched.intake import SchedulerStats
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import Sequence
from batchwright.step import Step

MAX_STEPS = 4000
"""Steps that are simulated at most, about: some two seconds."""

MAX_ROWS = 8192
STRETCHES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """The sizes of an engine; arguments as those of `Scheduler`.

    Attributes:
        horizon: rows it has at once.
    """

    groups: Seq[KVGroup]
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefix_sharing: bool
    horizon: int
    order: OrderFunction = fcfs

    def scheduler(self) -> Scheduler:
        """A scheduler of these sizes."""
        return Scheduler(
            self.groups,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            prefix_sharing=self.prefix_sharing,
            order=self.order,
        )

    def most_at_once(self, num_tokens: int) -> int:
        """Sequences of so many tokens that memory holds, if they share nothing; may be 0."""
        return min(group.num_blocks // self._need(group, num_tokens) for group in self.groups)

    def rows_at_once(self, num_tokens: int) -> int:
        """Sequences of so many tokens that run at once, if they share nothing."""
        return max(1, min(self.max_num_seqs, self.most_at_once(num_tokens)))

    def _need(self, group: KVGroup, num_tokens: int) -> int:
        return blocks_per_sequence(
            group.window, max(num_tokens, 1), self.block_size, self.max_num_batched_tokens
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a simulated run took.

    Attributes:
        seconds: of all rows.
        num_simulated: rows that were simulated.
        is_whole: these were all.
        stats: counts of the simulated rows.
        max_running: sequences that ran at once, at most.
        peak_kv_fraction: of the blocks of the fullest KV group, in use at once, at most.
    """

    seconds: float
    num_simulated: int
    is_whole: bool
    stats: SchedulerStats
    max_running: int
    peak_kv_fraction: float


def predict(
    rows: JobRows,
    columns: RowColumns,
    output: Int64Array,
    *,
    computed: Int64Array,
    engine: EngineSizes,
    cost: CostModel,
    total_work_s: float,
) -> Prediction:
    """Simulate rows with outputs of given lengths.

    Args:
        output: [num_rows] output tokens of each sequence.
        computed: ascending indices of the rows that are computed.
        total_work_s: `CostModel.work_s` of all of these.
    """
    chosen = choose_rows(columns.at(computed), output[computed], engine)
    is_whole = len(chosen) == len(computed)
    run = _Run(_families(rows, columns, output, computed[chosen]), engine, cost)
    run.run()
    seconds = run.clock.now()
    if not is_whole and run.started_work_s:
        drain_work_s = run.work_s - run.started_work_s
        rate = run.started_s / run.started_work_s
        seconds = (total_work_s - drain_work_s) * rate + seconds - run.started_s
    return Prediction(
        seconds, len(chosen), is_whole, run.scheduler.stats, run.max_running, run.peak_kv_fraction
    )


def choose_rows(columns: RowColumns, output: Int64Array, engine: EngineSizes) -> Int64Array:
    """Which rows to simulate: all if that takes about MAX_STEPS, else stretches of the job."""
    num_rows = len(columns)
    if not num_rows:
        return np.empty(0, np.int64)
    crowd = engine.rows_at_once(int((columns.num_prompt + output).mean()))
    decoding = float((columns.num_samples * output).sum()) / crowd
    computing = float(columns.num_prompt.sum()) / engine.max_num_batched_tokens
    share = min(1.0, MAX_STEPS / max(decoding, computing, 1.0), MAX_ROWS / num_rows)
    wanted = max(int(share * num_rows), 2 * crowd)
    if wanted >= num_rows:
        return np.arange(num_rows)
    length = max(1, wanted // STRETCHES)
    firsts = np.linspace(0, num_rows - length, STRETCHES).astype(np.int64)
    return np.unique(firsts[:, None] + np.arange(length))


class _Run:
    """One simulated run.

    Attributes:
        work_s: work done, see `CostModel.work_s`.
        started_s, started_work_s: time and work when the last row had started.
    """

    def __init__(self, families: Iterator[Sequence], engine: EngineSizes, cost: CostModel) -> None:
        self.clock = VirtualClock()
        self.scheduler = engine.scheduler()
        self.work_s = self.started_s = self.started_work_s = 0.0
        self.max_running, self.peak_kv_fraction = 0, 0.0
        self._families = families
        self._horizon = engine.horizon
        self._cost, self._costs = cost, StepCosts(cost, engine.block_size)
        self._executor = SimExecutor(self.clock, self)
        self._unfinished: Counter[str] = Counter()
        self._ended = False

    def seconds(self, step: Step) -> float:
        """What the executor charges for a step."""
        self.work_s += self._cost.step_work_s(step)
        return self._costs.seconds(step)

    def run(self) -> None:
        """Until all rows are done."""
        self._read()
        while (step := self.scheduler.schedule()) is not None:
            self._watch()
            update = self.scheduler.update(self._executor.execute(step))
            for sequence in update.finished:
                self._finish(sequence.request.id)
            self._read()

    def _read(self) -> None:
        while not self._ended and len(self._unfinished) < self._horizon:
            first = next(self._families, None)
            if first is None:
                self._ended = True
                return
            self.scheduler.add(first)
            self._unfinished[first.request.id] = 1 + len(first.siblings)

    def _finish(self, request_id: str) -> None:
        self._unfinished[request_id] -= 1
        if not self._unfinished[request_id]:
            del self._unfinished[request_id]

    def _watch(self) -> None:
        num_running = self.scheduler.books.slots.num_running
        self.max_running = max(self.max_running, num_running)
        used = max(1 - t.pool.num_free / t.pool.num_blocks for t in self.scheduler.books.tables)
        self.peak_kv_fraction = max(self.peak_kv_fraction, used)
        if not self._ended or num_running < self.scheduler.num_unfinished:
            self.started_s, self.started_work_s = self.clock.now(), self.work_s


def _families(
    rows: JobRows, columns: RowColumns, output: Int64Array, chosen: Int64Array
) -> Iterator[Sequence]:
    """The first sequence of each row, with its siblings."""
    tokens, offsets = rows.store.tokens(), rows.store.offsets
    for row in chosen.tolist():
        task = TASKS[columns.task[row]]
        first_needed, num_samples = int(columns.first_needed[row]), int(columns.num_samples[row])
        num_output = int(output[row])
        params = SamplingParams(
            n=num_samples,
            ignore_eos=True,
            prompt_logprobs=0 if task is Task.GENERATE and first_needed == 0 else None,
        )
        request = Request(
            id=str(row),
            prompt_token_ids=tokens[offsets[row] : offsets[row + 1]],
            params=params,
            task=task,
            score_start=first_needed + 1,
            pooling="last" if first_needed else "mean",
        )
        family = [_sequence(request, row, index, num_output) for index in range(num_samples)]
        family[0].siblings = family[1:]
        yield family[0]


def _sequence(request: Request, order: int, sample_index: int, num_output: int) -> Sequence:
    return Sequence(
        request=request,
        order=order,
        sample_index=sample_index,
        end_token_ids=(),
        noise_key=0,
        max_len=len(request.prompt_token_ids) + num_output,
        token_ids=request.prompt_token_ids,
    )
