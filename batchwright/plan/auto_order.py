"""AutoOrder: an order that tries the others on a sample of the rows and takes the best.

Not a file of `plan/orders/`, because it remembers its choice: trying costs far more than ordering,
so it is done when the first rows are known, and again when they have become many more. The machine
is measured before the first trial, and only then; never by a thread beside the engine's, which
would measure what the engine leaves of it, and slow it down.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from batchwright.plan.job_tree import Int64Array, JobTree, build_job_tree
from batchwright.plan.order import JobFacts, Order, OrderFunction, Rates, find_order
from batchwright.request import Int32Array

logger = logging.getLogger(__name__)

YARDSTICK = "fcfs"

UNTRIED = "prefix_dfs"
"""For jobs that share something but are too short to try: it computes no more than YARDSTICK."""

MAX_SHARE_OF_RUN = 0.02
"""Of the predicted run time, what measuring the machine and trying may take together."""

SIMULATED_ROUND_S = 4e-4
"""What simulating one round takes, roughly; counted, not measured, so that choices can be repeated.

0.1 to 0.35 ms on one core of a Sapphire Rapids server (benchmarks/orders.py)."""

MOST_ROUNDS = 20_000
"""Steps simulated in all, about: however long the job is, some seconds are enough to choose."""

LEAST_GAIN = 0.01
"""Less than this share of the time is no reason to leave the order in which rows came."""

FEW_ROWS = 16
"""Below that many rows there is nothing to choose."""

GUESS_ROWS = 64
"""Rows by which it is judged how many can be tried."""

RUN_LENGTH = 16
"""Neighbours in the prefix tree that a sample keeps together."""

REPEAT_GROWTH = 4
"""The choice is made again for more than so many times the rows it was made for."""


class Prediction(NamedTuple):
    """How long a job takes in an order, and the rounds that were simulated to tell.

    A round is a Step, or equal Steps that are charged at once.
    """

    seconds: float
    num_rounds: int


Predict = Callable[[JobFacts, OrderFunction, float], Prediction]
"""(sample, order, the sample's share of the job) -> what a simulation says of the whole job."""


class Measured(NamedTuple):
    """A machine that was measured.

    Attributes:
        predict: simulates on it.
        rates: what tokens cost on it.
        seconds: that measuring took.
    """

    predict: Predict
    rates: Rates
    seconds: float


class Choice(NamedTuple):
    """An order, what each candidate was predicted to take, for how many rows."""

    name: str
    seconds: dict[str, float]
    num_rows: int

    def __str__(self) -> str:
        if self.name not in self.seconds:
            return f"order {self.name}: {self.num_rows:,} rows are too little work to try others"
        others = ", ".join(
            f"{name} {seconds:.1f} s"
            for name, seconds in sorted(self.seconds.items(), key=lambda item: item[1])
            if name != self.name
        )
        return (
            f"order {self.name}: {self.seconds[self.name]:.1f} s predicted for "
            f"{self.num_rows:,} rows ({others})"
        )


class AutoOrder:
    """Orders rows as the best candidate does.

    Args:
        measure: measures the machine.
        candidates: orders to try, YARDSTICK among them.
        measure_s: seconds that measuring will take, about.
        token_s: less than what a computed token takes; jobs that these make too short for measuring
            are not tried.
        is_told: log each choice; of no use for pretended engines.

    Attributes:
        choice: the latest; None before there was one.
    """

    def __init__(
        self,
        measure: Callable[[], Measured],
        candidates: Sequence[str],
        *,
        measure_s: float,
        token_s: float,
        is_told: bool = True,
    ) -> None:
        assert YARDSTICK in candidates
        self._measure, self._candidates = measure, candidates
        self._measure_s, self._token_s = measure_s, token_s
        self._is_told = is_told
        self._measured: Measured | None = None
        self._engines: AutoOrder | None = None  # if this one is beside it
        self.choice: Choice | None = None

    def measure_for(self, num_tokens: float) -> None:
        """Measure the machine now, if that pays for a job that computes at least so many tokens."""
        if self.measured is None and self._pays_for(num_tokens):
            self._measured = self._measure()

    def beside_engine(self) -> AutoOrder:
        """One for another thread: it chooses for itself, and knows only what this one measured."""
        other = AutoOrder(
            self._measure,
            self._candidates,
            measure_s=self._measure_s,
            token_s=self._token_s,
            is_told=False,
        )
        other._engines = self
        return other

    @property
    def measured(self) -> Measured | None:
        """The machine, once it was measured."""
        return self._measured if self._engines is None else self._engines.measured

    def _pays_for(self, num_tokens: float) -> bool:
        return MAX_SHARE_OF_RUN * self._token_s * num_tokens >= self._measure_s

    def __call__(self, job: JobFacts) -> Order:
        num_tried = 0 if self.choice is None else self.choice.num_rows
        if job.num_rows >= FEW_ROWS and job.num_rows > REPEAT_GROWTH * num_tried:
            self.choice = self._choose(job)
            if self._is_told:
                logger.info("%s", self.choice)
        name = self.choice.name if self.choice else YARDSTICK
        return find_order(name)(self._with_rates(job))

    def _with_rates(self, job: JobFacts) -> JobFacts:
        if self.measured is None:
            return job
        return replace(job, make_tree=lambda: job.tree, rates=self.measured.rates)

    def _choose(self, job: JobFacts) -> Choice:
        sample = self._affordable_sample(job)
        if sample is None:
            shares = job.tree.num_distinct_tokens() < job.tree.depth[job.tree.node_of_row].sum()
            return Choice(UNTRIED if shares else YARDSTICK, {}, job.num_rows)
        assert self.measured is not None
        seconds = self._try(self.measured, sample, sample.num_rows / job.num_rows)
        best = min(seconds, key=lambda name: (seconds[name], name))
        if seconds[best] > (1 - LEAST_GAIN) * seconds[YARDSTICK]:
            best = YARDSTICK
        return Choice(best, seconds, job.num_rows)

    def _try(self, measured: Measured, sample: JobFacts, share: float) -> dict[str, float]:
        """Predicted seconds of every candidate; orders that agree are simulated once."""
        predict = measured.predict
        seconds: dict[str, float] = {}
        tried: dict[bytes, float] = {}
        for name in self._candidates:
            function = find_order(name)
            order = function(sample)
            key = order.rows.tobytes() if order.units is None else name.encode()
            if key not in tried:
                tried[key] = predict(sample, function, share).seconds
            seconds[name] = tried[key]
        return seconds

    def _affordable_sample(self, job: JobFacts) -> JobFacts | None:
        """As many rows as trying all candidates may take time for, judged by a few."""
        measured, spent_s = self.measured, 0.0
        if measured is None:
            if self._engines is not None or not self._pays_for(_least_tokens(job)):
                return None
            measured = self._measured = self._measure()
            spent_s = measured.seconds
        job = self._with_rates(job)
        few = sample_of(job, GUESS_ROWS)
        predict = measured.predict
        guess = predict(few, find_order(YARDSTICK), few.num_rows / job.num_rows)
        num_rounds = len(self._candidates) * guess.num_rounds
        affordable = (MAX_SHARE_OF_RUN * guess.seconds - spent_s) / (num_rounds * SIMULATED_ROUND_S)
        if affordable < 1:
            return None
        most = max(MOST_ROUNDS / num_rounds, 1)
        return sample_of(job, int(min(affordable, most) * few.num_rows))


def _least_tokens(job: JobFacts) -> float:
    """Tokens that any order computes."""
    tree = job.tree
    alone = (job.num_prompt_tokens - tree.depth[tree.node_of_row]).sum()
    return float(alone + tree.num_distinct_tokens() + job.num_output_tokens.sum())


def sample_of(job: JobFacts, num_rows: int) -> JobFacts:
    """About so many rows, as they came: runs of rows that are neighbours in the prefix tree.

    Rows drawn one by one would share less than the job does.
    """
    if num_rows >= job.num_rows:
        return job
    num_runs = max(num_rows // RUN_LENGTH, 1)
    length = num_rows // num_runs
    starts = np.linspace(0, job.num_rows - length, num_runs).astype(np.int64)
    lines = (starts[:, None] + np.arange(length)).ravel()
    rows = np.unique(job.tree.rows[lines])
    return JobFacts(
        num_prompt_tokens=job.num_prompt_tokens[rows],
        num_output_tokens=job.num_output_tokens[rows],
        make_tree=lambda: _subtree(job.tree, rows),
        rates=job.rates,
    )


def shared_tokens(tree: JobTree, rows: Int64Array) -> list[Int32Array]:
    """For each row a run of numbers as long as its path in the tree, that shares what it shares."""
    paths = []
    for row in rows.tolist():
        node, nodes = int(tree.node_of_row[row]), []
        while node > 0:
            nodes.append(node)
            node = int(tree.parent[node])
        path = np.array(nodes[::-1], np.int32)
        paths.append(np.repeat(path, (tree.depth - tree.start)[path]))
    return paths


def _subtree(tree: JobTree, rows: Int64Array) -> JobTree:
    paths = shared_tokens(tree, rows)
    offsets = np.cumsum([0, *(len(path) for path in paths)])
    return build_job_tree(np.concatenate([np.empty(0, np.int32), *paths]), offsets)
