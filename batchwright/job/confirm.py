"""Confirm: settings that look better are run against the ones one has, on a sample of the rows.

A prediction is one thing, a machine another. The contestants run the same rows in turns, each turn
in the opposite order of the one before, so that a machine that gets slower does so for all of them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from batchwright.job.directory import JobDirectory, job_directory_for
from batchwright.job.rows import InputRow, RowError
from batchwright.job.run_job import JobModel, JobPaths, run_job
from batchwright.job.runner import JobOptions
from batchwright.job.trials import Trials
from batchwright.plan.advise.knobs import LEAST_GAIN, Knobs
from batchwright.plan.job_rows import Int64Array

if TYPE_CHECKING:
    from batchwright.prompt_cache.compose import PromptSchemas

MIN_ROUNDS, MAX_ROUNDS = 3, 7
STRETCHES, STRETCH_ROWS = 4, 16
"""The sample is so many stretches of neighbours, or fewer that are not shorter than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """Real runs of a sample.

    Attributes:
        knobs: the settings that were run, one's own first.
        predicted_s: what each was predicted to take for the sample.
        rounds: seconds of each, in turns.
        num_rows: of the sample.
        is_whole: it was the whole job.
    """

    knobs: tuple[Knobs, ...]
    predicted_s: tuple[float, ...]
    rounds: tuple[tuple[float, ...], ...]
    num_rows: int
    is_whole: bool

    def ratios(self, index: int) -> list[float]:
        """Time over that of one's own settings in the same round."""
        return [times[index] / times[0] for times in self.rounds]

    def median_s(self, index: int) -> float:
        """Seconds."""
        return statistics.median(times[index] for times in self.rounds)

    def beats(self, index: int) -> bool:
        """Whether it was faster in every round, and by LEAST_GAIN in the median one."""
        ratios = self.ratios(index)
        return max(ratios) < 1 and statistics.median(ratios) <= 1 - LEAST_GAIN

    @property
    def winner(self) -> int:
        """Which won: the one with the least median ratio of those that beat the first; else 0."""
        winners = [index for index in range(1, len(self.knobs)) if self.beats(index)]
        return min(winners, key=lambda index: statistics.median(self.ratios(index)), default=0)


def sample_places(num_rows: int, share: float) -> Int64Array:
    """Ascending places of a share of the rows: stretches of neighbours, evenly spread."""
    wanted = min(max(round(share * num_rows), STRETCH_ROWS), num_rows)
    if wanted == num_rows:
        return np.arange(num_rows)
    number = min(max(wanted // STRETCH_ROWS, 1), STRETCHES)
    length = wanted // number
    starts = np.linspace(0, num_rows - length, number).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(length))


def take_places(
    rows: Iterator[InputRow | RowError], places: Int64Array
) -> list[InputRow | RowError]:
    """The rows at ascending places, counted from 0."""
    wanted = set(places.tolist())
    last = int(places[-1]) + 1 if len(places) else 0
    return [row for place, row in enumerate(islice(rows, last)) if place in wanted]


def run_in_turns(
    runs: Sequence[Callable[[], float]],
    budget_s: float,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[tuple[float, ...], ...]:
    """Seconds of each run in each round.

    There are MIN_ROUNDS, fewer if two rounds have used up the time, and more while there is time.
    """
    rounds: list[tuple[float, ...]] = []
    start_s = now()
    while True:
        order = range(len(runs))
        times = {i: runs[i]() for i in (reversed(order) if len(rounds) % 2 else order)}
        rounds.append(tuple(times[i] for i in order))
        used_s = now() - start_s
        next_s = used_s * (len(rounds) + 1) / len(rounds)
        if len(rounds) >= MAX_ROUNDS or (len(rounds) >= MIN_ROUNDS and next_s > budget_s):
            return tuple(rounds)
        if len(rounds) >= 2 and used_s > budget_s:
            return tuple(rounds)


class SampleRunner:
    """Runs sampled rows as `batchwright run` does, in a folder that vanishes.

    Args:
        load: a model with these settings; each is loaded once and kept.
        use_threads: called before each run with the threads of its settings.
        schemas: those that rows may name in prompt_cache.
    """

    def __init__(
        self,
        rows: Sequence[InputRow | RowError],
        load: Callable[[Knobs], JobModel],
        use_threads: Callable[[int], None],
        schemas: PromptSchemas | None = None,
    ) -> None:
        self._rows, self._load, self._use_threads = rows, load, use_threads
        self._schemas = schemas
        self._models: dict[Knobs, JobModel] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="batchwright-")
        self._number = count()

    def prepare(self, knobs: Knobs) -> None:
        """Load the model and run one row, which compiles what there is to compile."""
        if knobs not in self._models:
            self._models[knobs] = self._load(knobs)
            self._run(knobs, self._rows[:1])

    def seconds(self, knobs: Knobs) -> float:
        """Of running all of the sample."""
        return self._run(knobs, self._rows)

    def _run(self, knobs: Knobs, rows: Sequence[InputRow | RowError]) -> float:
        self._use_threads(knobs.num_threads)
        model = self._models[knobs]
        output = Path(self._folder.name) / f"{next(self._number)}.jsonl"
        paths = JobPaths(str(output), str(output.with_suffix(".errors.jsonl")))
        options = JobOptions(model_name=model.name, created=int(time.time()), input_bytes=None)
        try:
            with JobDirectory(job_directory_for(str(output))) as directory:
                summary = run_job(
                    iter(rows), paths, directory, model, options, schemas=self._schemas
                )
                return summary.run_s
        finally:
            model.engine.abandon()  # or the next run would be answered from the results of this one

    def close(self) -> None:
        """Remove what was written."""
        self._folder.cleanup()

    def __enter__(self) -> SampleRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def confirm(
    simulation: Trials,
    contenders: Sequence[Knobs],
    rows: Iterator[InputRow | RowError],
    num_rows: int,
    load: Callable[[Knobs], JobModel],
    use_threads: Callable[[int], None],
    budget_s: float,
    schemas: PromptSchemas | None = None,
) -> Confirmation:
    """Run a sample of the job with the settings one has and with those of the contenders.

    Args:
        simulation: of the job; its own settings are run first.
        rows: all of the input, from its beginning; `num_rows` of them.
        load, use_threads, schemas: see `SampleRunner`.
        budget_s: about what the runs may take, loading aside.
    """
    own = simulation.own
    expected = simulation.trial(own)
    assert expected is not None, "contenders are compared with settings that are possible"
    knobs = (own, *contenders)
    each_s = budget_s / (MIN_ROUNDS * len(knobs))
    places = sample_places(num_rows, each_s / max(expected.seconds, 1e-9))
    computed = simulation.job.computed
    computed = computed[np.isin(simulation.job.columns.place[computed], places)]
    predicted = [simulation.trial_of(one, computed) for one in knobs]
    with SampleRunner(take_places(rows, places), load, use_threads, schemas) as runner:
        for one in knobs:
            runner.prepare(one)
        rounds = run_in_turns([partial(runner.seconds, one) for one in knobs], budget_s)
    return Confirmation(
        knobs=knobs,
        predicted_s=tuple(0.0 if one is None else one.seconds for one in predicted),
        rounds=rounds,
        num_rows=len(places),
        is_whole=len(places) == num_rows,
    )
