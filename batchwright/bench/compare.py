"""compare: workloads on our engine and on others, in turns, each run in a fresh process.

A round runs every workload on every engine; the engine that begins moves on by one a round. Ours
runs first in the first round, since it says how long the others may take, and what they are
compared with. The machine's rates are measured before the first and after the last round.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import batchwright
from batchwright.bench.bounds import Bounds, Rates, bounds
from batchwright.bench.engines import Peer, peer_environment
from batchwright.bench.fresh_process import EngineFailure, EngineRun, run_engine, write_job
from batchwright.bench.necessary_work import NecessaryWork, necessary_work
from batchwright.bench.workloads import WorkRequest
from batchwright.errors import BatchwrightError
from batchwright.plan.shape import ModelShape

LONGEST_RATIO, LEAST_LIMIT_S = 12.0, 120.0
"""Another engine is stopped when it takes so many times as long as ours did, and so long."""

OWN_LONGEST_S = 24 * 3600.0
NUM_FIRST = 8
TIE = 1e-3
"""Greedy tokens may differ where the reference's two highest logits are this close (fp32)."""

OURS = "batchwright"
OWN_COMMAND = (sys.executable, "-m", "batchwright.bench.own")


class BenchError(BatchwrightError):
    """Our own engine gave no result."""


@dataclass
class Agreement:
    """Another engine's greedy tokens against ours.

    Attributes:
        num_equal_first, num_equal_begin, num_equal: rows with the same first token, the same first
            NUM_FIRST tokens (or all, if there are fewer), the same tokens throughout.
        num_ties: of the rows that part, those where the reference's two highest logits are within
            TIE; None: the engine is not the reference.
        largest_margin: between these two, of all rows that part.
    """

    num_rows: int
    num_equal_first: int
    num_equal_begin: int
    num_equal: int
    num_ties: int | None = None
    largest_margin: float | None = None


@dataclass
class Measured:
    """One engine on one workload.

    Attributes:
        runs: one a round, as far as it had any.
        failure: why there are no more; None: there were as many as asked for.
    """

    runs: list[EngineRun] = field(default_factory=list)
    failure: str | None = None
    agreement: Agreement | None = None

    @property
    def seconds(self) -> float:
        """The median of the runs."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def ready_s(self) -> float:
        """The median of the runs."""
        return statistics.median(run.ready_s for run in self.runs)

    @property
    def peak_bytes(self) -> int:
        """The most of all runs."""
        return max(run.peak_bytes for run in self.runs)

    @property
    def spread(self) -> float:
        """From the fastest to the slowest run, as a share of the median."""
        times = [run.seconds for run in self.runs]
        return (max(times) - min(times)) / self.seconds

    def mean_parts(self) -> dict[str, float]:
        """Of our own runs: share of the time by part."""
        parts: list[dict[str, float]] = [run.more["parts_s"] for run in self.runs]
        total = sum(sum(one.values()) for one in parts) or 1.0
        return {name: sum(one[name] for one in parts) / total for name in parts[0]}


@dataclass
class Workload:
    """A workload, its necessary work, and what each engine did with it."""

    name: str
    requests: list[WorkRequest]
    work: NecessaryWork
    engines: dict[str, Measured]

    @property
    def own(self) -> Measured:
        """Ours."""
        return self.engines[OURS]


class Comparison(NamedTuple):
    """All that was measured."""

    workloads: list[Workload]
    rates: Rates

    def bounds(self, workload: Workload) -> Bounds:
        """Of one of the workloads."""
        return bounds(workload.work, self.rates)


def compare(
    workloads: Mapping[str, list[WorkRequest]],
    shape: ModelShape,
    *,
    model: Path,
    settings: dict[str, Any],
    num_threads: int,
    peers: Sequence[Peer],
    num_rounds: int,
    measure_rates: Callable[[], Rates],
    tell: Callable[[str], None],
    keep: Callable[[Comparison], None] = lambda found: None,
) -> Comparison:
    """Measure.

    Args:
        model, settings: of our engine; fields of EngineConfig.
        measure_rates: called before the first and after the last round.
        tell: is given a line after each run.
        keep: is given what is known after each run, in case it is the last.
    Raises:
        BenchError: our own engine failed.
    """
    labels = [OURS, *(peer.label for peer in peers)]
    measured = [
        Workload(
            name, requests, necessary_work(requests, shape), {label: Measured() for label in labels}
        )
        for name, requests in workloads.items()
    ]
    job = {"model": str(model), "dtype": settings.get("dtype", "auto"), "num_threads": num_threads}
    own = _Runner(
        [*OWN_COMMAND],
        {**job, "settings": settings},
        _own_environment(),
    )
    runners = {
        peer.label: _Runner(
            peer.command,
            {"model": peer.model, "dtype": peer.dtype, "num_threads": num_threads},
            peer_environment(os.environ),
        )
        for peer in peers
    }
    rates = measure_rates()
    for round_index in range(num_rounds):
        for workload in measured:
            first = round_index % len(labels)
            for label in labels[first:] + labels[:first]:
                if label == OURS:
                    _run_own(own, workload)
                else:
                    _run_peer(runners[label], label, workload, measured)
                tell(_line(workload, label, round_index, num_rounds))
                keep(Comparison([one for one in measured if one.own.runs], rates))
    return Comparison(measured, rates.best(measure_rates()))


def _own_environment() -> dict[str, str]:
    """Our process imports the package that this one has, wherever it was found."""
    folders = [str(Path(batchwright.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


class _Runner(NamedTuple):
    """How an engine is run."""

    command: list[str]
    job: dict[str, Any]
    environment: dict[str, str]

    def run(
        self, workload: Workload, longest_s: float, ours: list[list[int]] | None = None
    ) -> EngineRun:
        with tempfile.TemporaryDirectory(prefix="batchwright-bench-") as name:
            folder = Path(name)
            write_job(folder, workload.requests, self.job, ours)
            return run_engine(self.command, folder, self.environment, longest_s=longest_s)


def _run_own(runner: _Runner, workload: Workload) -> None:
    try:
        workload.own.runs.append(runner.run(workload, OWN_LONGEST_S))
    except EngineFailure as failure:
        raise BenchError(f"our own run of {workload.name} failed: {failure}") from failure


def _run_peer(
    runner: _Runner, label: str, workload: Workload, workloads: Sequence[Workload]
) -> None:
    """A run that fails is not tried again; an engine that does not load, with no workload."""
    measured = workload.engines[label]
    if measured.failure is not None:
        return
    ours = workload.own.runs[0].token_ids
    try:
        longest_s = max(LONGEST_RATIO * workload.own.seconds, LEAST_LIMIT_S)
        run = runner.run(workload, longest_s, ours)
    except EngineFailure as failure:
        for one in [workload] if failure.was_ready else workloads:
            one.engines[label].failure = str(failure)
        return
    if measured.agreement is None:
        measured.agreement = agreement(ours, run.token_ids, run.more.get("margins"))
    measured.runs.append(run)


def agreement(
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    margins: Sequence[float] | None = None,
) -> Agreement:
    """Count equal rows.

    Args:
        margins: of each row that parts, what the reference says of its two highest logits.
    """
    pairs = list(zip(ours, theirs, strict=True))
    return Agreement(
        num_rows=len(pairs),
        num_equal_first=sum(a[:1] == b[:1] for a, b in pairs),
        num_equal_begin=sum(a[:NUM_FIRST] == b[:NUM_FIRST] for a, b in pairs),
        num_equal=sum(a == b for a, b in pairs),
        num_ties=None if margins is None else sum(margin < TIE for margin in margins),
        largest_margin=None if margins is None else max(margins, default=0.0),
    )


def _line(workload: Workload, label: str, round_index: int, num_rounds: int) -> str:
    """What is told after a run."""
    measured = workload.engines[label]
    what = f"round {round_index + 1}/{num_rounds} {workload.name} {label}: "
    if len(measured.runs) > round_index:
        run = measured.runs[-1]
        return what + f"{run.seconds:.2f} s, after {run.ready_s:.1f} s of start-up"
    return what + str(measured.failure)
