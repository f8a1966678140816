"""How long rows will take: the real scheduler on a pretended model and a virtual clock.

A long job is simulated in part: stretches of its rows, evenly spread. What was simulated until the
last row had started is scaled up by the work it did (`CostModel.work_s`); the drain after it, when
fewer and fewer rows run, is added once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from batchwright.plan.cost import CostModel
from batchwright.plan.job_rows import TASKS, Int64Array, JobRows, RowColumns
from batchwright.plan.shared_keys import StepCosts
from batchwright.request import Request, SamplingParams, Task
from batchwright.sched.intake import SchedulerStats
from batchwright.sequence import Sequence
from batchwright.simulate import EngineSizes, Moment, Simulation

MAX_STEPS = 4000
"""Steps that are simulated at most, about: a second or two."""

MAX_ROWS = 8192
STRETCHES = 4


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
    run = Simulation(
        families(rows, columns, output, computed[chosen]),
        engine,
        StepCosts(cost, engine.block_size),
    )
    run.run()
    seconds = run.clock.now()
    started_work_s = _work_s(cost, run.started)
    if not is_whole and started_work_s:
        drain_work_s = _work_s(cost, run.now()) - started_work_s
        rate = run.started.seconds / started_work_s
        seconds = (total_work_s - drain_work_s) * rate + seconds - run.started.seconds
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


def _work_s(cost: CostModel, moment: Moment) -> float:
    """`CostModel.work_s` of all that was computed until then."""
    work = moment.work
    num_keys = [sum(pair) for pair in zip(work.num_prompt_keys, work.num_output_keys, strict=True)]
    if not num_keys:
        return 0.0
    num_tokens = work.num_prompt_tokens + work.num_output_tokens
    return cost.work_s(num_tokens, num_keys, work.num_logits + work.num_scored, moment.num_draws)


def families(
    rows: JobRows,
    columns: RowColumns,
    output: Int64Array,
    chosen: Int64Array,
    *,
    end_token_ids: tuple[int, ...] = (),
) -> Iterator[Sequence]:
    """The first sequence of each row, with its siblings; their noise keys are the row's number.

    Args:
        output: [num_rows] output tokens that each sequence may have, and has if nothing ends it.
        chosen: [num_chosen] the rows.
    """
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
        family = [
            _sequence(request, row, index, num_output, end_token_ids)
            for index in range(num_samples)
        ]
        family[0].siblings = family[1:]
        yield family[0]


def _sequence(
    request: Request, row: int, sample_index: int, num_output: int, end_token_ids: tuple[int, ...]
) -> Sequence:
    return Sequence(
        request=request,
        order=row,
        sample_index=sample_index,
        end_token_ids=end_token_ids,
        noise_key=row,
        max_len=len(request.prompt_token_ids) + num_output,
        token_ids=request.prompt_token_ids,
    )
