"""Real runs in turns: what is sampled, how often, and who wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.clock import VirtualClock
from batchwright.job.confirm import (
    Confirmation,
    SampleRunner,
    run_in_turns,
    sample_places,
    take_places,
)
from batchwright.plan.advise.knobs import Knobs
from tests.job.fakes import FakeEngine, FakeModel, chat_row, read_rows, write_lines

OWN = Knobs(max_num_seqs=256, max_num_batched_tokens=512, order="fcfs", num_threads=2)
OTHER = Knobs(max_num_seqs=64, max_num_batched_tokens=512, order="fcfs", num_threads=1)


@given(st.integers(1, 3000), st.floats(0, 1.5))
def test_a_sample_is_stretches_of_the_job(num_rows: int, share: float) -> None:
    places = sample_places(num_rows, share)
    assert (np.diff(places) > 0).all()
    assert (places[0] == 0 and places[-1] == num_rows - 1) or len(places) <= 31
    assert places[0] >= 0 and places[-1] < num_rows
    wanted = min(max(round(share * num_rows), 16), num_rows)
    assert wanted - 4 < len(places) <= wanted
    assert 1 + (np.diff(places) > 1).sum() <= 4


def test_rows_at_places(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [chat_row(f"r{i}") for i in range(9)])
    rows = take_places(read_rows(path), np.array([0, 3, 4]))
    assert [row.custom_id for row in rows] == ["r0", "r3", "r4"]
    assert take_places(read_rows(path), np.array([], np.int64)) == []


def runs(clock: VirtualClock, log: list[int], *seconds: float) -> list[Callable[[], float]]:
    def make(index: int, took_s: float) -> Callable[[], float]:
        def run() -> float:
            log.append(index)
            clock.advance(took_s)
            return took_s

        return run

    return [make(index, took_s) for index, took_s in enumerate(seconds)]


@pytest.mark.parametrize(
    "budget_s, rounds", [(100, 7), (15, 5), (14.9, 4), (9, 3), (7, 3), (6, 3), (5.9, 2), (0, 2)]
)
def test_how_many_rounds(budget_s: float, rounds: int) -> None:
    clock, log = VirtualClock(), []
    times = run_in_turns(runs(clock, log, 1.0, 2.0), budget_s, clock.now)
    assert times == ((1.0, 2.0),) * rounds
    assert log == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1][: 2 * rounds]  # each turn turned


def confirmation(*rounds: tuple[float, ...]) -> Confirmation:
    knobs = (OWN, OTHER, OTHER)[: len(rounds[0])]
    return Confirmation(
        knobs=knobs, predicted_s=(1.0,) * len(knobs), rounds=rounds, num_rows=9, is_whole=False
    )


def test_who_wins() -> None:
    assert confirmation((10, 9), (12, 11), (8, 7)).winner == 1
    assert confirmation((10, 9), (12, 12.1), (8, 7)).winner == 0  # not in every round
    assert confirmation((10, 9.99), (12, 11.99), (8, 7.99)).winner == 0  # too little
    assert confirmation((10, 9, 8), (10, 9, 8)).winner == 2
    assert confirmation((10, 9, 8), (10, 9, 11)).winner == 1
    found = confirmation((10, 9), (20, 16), (10, 7))
    assert found.ratios(1) == [0.9, 0.8, 0.7]
    assert found.median_s(1) == 9


def test_every_run_computes_every_row(tmp_path: Path) -> None:
    """Nothing is answered from a run before, nothing is left, and each model is loaded once."""
    path = write_lines(
        tmp_path / "in.jsonl", [chat_row(f"r{i}", max_tokens=2, temperature=0) for i in range(5)]
    )
    loaded: list[Knobs] = []
    threads: list[int] = []
    engines: dict[Knobs, FakeEngine] = {}

    def load(knobs: Knobs) -> FakeModel:
        loaded.append(knobs)
        engines[knobs] = Recalling()
        return FakeModel(engines[knobs])

    rows = list(read_rows(path))
    with SampleRunner(rows, load, threads.append) as runner:
        for knobs in (OWN, OTHER, OWN):
            runner.prepare(knobs)
        folder = Path(runner._folder.name)
        for knobs in (OWN, OTHER, OTHER):
            assert runner.seconds(knobs) > 0
        assert folder.exists()
    assert not folder.exists()
    assert loaded == [OWN, OTHER]
    assert threads == [2, 1, 2, 1, 1]
    tokens = {knobs: engine.stats.num_generated_tokens for knobs, engine in engines.items()}
    assert tokens == {OWN: 2 * (1 + 5), OTHER: 2 * (1 + 5 + 5)}


class Recalling(FakeEngine):
    """As the engine: it answers what it has answered before, until it is told to forget."""

    known: set[str] = set()

    def add(self, request) -> None:
        assert request.id not in self.known, "this would be answered without computing"
        self.known = self.known | {request.id}
        super().add(request)

    def abandon(self) -> None:
        super().abandon()
        self.known = set()
