"""compare: turns, failures, what the others are compared with. Engines are scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchwright.bench import compare as compare_module
from batchwright.bench.bounds import Rates
from batchwright.bench.compare import Agreement, BenchError, Comparison, agreement, compare
from batchwright.bench.engines import KINDS, Peer
from batchwright.bench.workloads import WorkRequest
from batchwright.plan.cost import RateCurve
from tests.bench.fake_engine import GOOD, fake_engine
from tests.bench.tiny import TINY

WORKLOADS = {
    "A": [WorkRequest([1, 2, 3], 2), WorkRequest([4], 10)],
    "B": [WorkRequest([5, 6], 1)],
}
CURVE = RateCurve((1, 8), (1e3, 1e4))
NOTE = "open(os.environ['TURNS'], 'a').write({name!r} + '\\n')\n"


class Bench:
    """Comparisons of fake engines, each named for its script."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        self.told: list[str] = []
        self.kept: list[Comparison] = []
        monkeypatch.setenv("TURNS", str(folder / "turns"))
        self.own(GOOD)

    def own(self, body: str) -> None:
        script = fake_engine(self._folder / "own", NOTE.format(name="own") + body)
        self._monkeypatch.setattr(compare_module, "OWN_COMMAND", (script,))

    def peer(self, name: str, body: str = GOOD) -> Peer:
        script = fake_engine(self._folder / name, NOTE.format(name=name) + body)
        return Peer(name, KINDS["vllm"], script, "their model", "float32")

    def run(self, *peers: Peer, num_rounds: int = 1) -> Comparison:
        return compare(
            WORKLOADS,
            TINY,
            model=Path("our model"),
            settings={"dtype": "float32"},
            num_threads=1,
            peers=peers,
            num_rounds=num_rounds,
            measure_rates=lambda: Rates(CURVE, CURVE, CURVE),
            tell=self.told.append,
            keep=self.kept.append,
        )

    @property
    def turns(self) -> list[str]:
        return (self._folder / "turns").read_text().split()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_engines_take_turns(bench: Bench) -> None:
    found = bench.run(bench.peer("x"), bench.peer("y"), num_rounds=2)
    round_1, round_2 = 2 * ["own", "x", "y"], 2 * ["x", "y", "own"]
    assert bench.turns == round_1 + round_2
    assert len(bench.told) == 12
    assert bench.told[0].startswith("round 1/2 A batchwright: 2.00 s, after ")
    for workload in found.workloads:
        for measured in workload.engines.values():
            assert len(measured.runs) == 2 and measured.failure is None
            assert measured.seconds == 2.0 and measured.spread == 0
    settings = found.workloads[0].engines["x"].runs[0].settings
    assert settings == {"model": "their model"}
    assert found.workloads[0].own.runs[0].settings == {"model": "our model"}


def test_what_is_known_is_kept_after_each_run(bench: Bench) -> None:
    found = bench.run(bench.peer("x"))
    assert [[one.name for one in kept.workloads] for kept in bench.kept] == [
        ["A"],
        ["A"],
        ["A", "B"],
        ["A", "B"],
    ]
    assert bench.kept[-1] == found


def test_one_that_does_not_load_is_not_tried_again(bench: Bench) -> None:
    found = bench.run(bench.peer("x", "sys.exit('no engine')"), bench.peer("y"), num_rounds=2)
    assert bench.turns.count("x") == 1 and bench.turns.count("y") == 4
    for workload in found.workloads:
        assert workload.engines["x"].failure == "ended with status 1: no engine"
        assert not workload.engines["x"].runs
        assert workload.engines["y"].failure is None
    assert bench.told[1] == "round 1/2 A x: ended with status 1: no engine"


def test_one_that_fails_with_a_workload_goes_on_with_others(bench: Bench) -> None:
    body = "loaded()\nif len(rows) > 1: sys.exit('too much')\nfinished(answers)"
    found = bench.run(bench.peer("x", body), num_rounds=2)
    a, b = (workload.engines["x"] for workload in found.workloads)
    assert a.failure == "ended with status 1: too much" and not a.runs
    assert b.failure is None and len(b.runs) == 2


def test_one_that_takes_far_too_long_is_stopped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "LEAST_LIMIT_S", 0.3)
    monkeypatch.setattr(compare_module, "LONGEST_RATIO", 0.1)
    found = bench.run(bench.peer("x", "loaded(); time.sleep(60)"))
    assert [one.engines["x"].failure for one in found.workloads] == 2 * ["not done after 0 s"]


def test_our_own_failure_ends_all(bench: Bench) -> None:
    bench.own("sys.exit('out of luck')")
    with pytest.raises(BenchError, match=r"our own run of A failed: .* out of luck"):
        bench.run(bench.peer("x"))
    assert bench.turns == ["own"]


def test_answers_are_compared(bench: Bench) -> None:
    """The reference is given ours, and tells its margins where it parts."""
    body = """
ours = json.load(open(folder + "/ours.json"))
assert ours == answers
answers[-1][-1] = 0
loaded(); finished(answers, margins=[0.5])
"""
    found = bench.run(bench.peer("x", body))
    assert found.workloads[0].engines["x"].agreement == Agreement(2, 2, 2, 1, 0, 0.5)


def test_agreement() -> None:
    ours = [[1, 2, 3], [1, *range(20)], [4], [5]]
    theirs = [[1, 2, 4], [1, *range(19), 0], [4], [6]]
    assert agreement(ours, theirs) == Agreement(4, 3, 2, 1)
    found = agreement(ours, theirs, [1e-4, 0.2, 1e-5])
    assert found.num_ties == 2 and found.largest_margin == 0.2
    assert agreement(ours, ours, []).largest_margin == 0.0


def test_shares_of_the_bounds(bench: Bench) -> None:
    found = bench.run()
    least = found.bounds(found.workloads[0])
    assert least.layer_rows == (4 + 1 + 9) / 10
    assert least.rows_aware_s > least.plain_s > 0
