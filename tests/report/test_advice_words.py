"""Which of the simulated settings are shown."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

from batchwright.plan.advise.knobs import Knobs, Trial
from batchwright.report.advice_words import worth_showing

OWN = Knobs(max_num_seqs=8, max_num_batched_tokens=512, order="auto", num_threads=1)


def trial(seconds: float, **changes: object) -> Trial:
    return Trial(dataclasses.replace(OWN, **changes), seconds, 0.1, 1.0, 1, 1)


def test_block_sizes_that_gain_nothing_are_left_out() -> None:
    own, fast = trial(9.0), trial(5.0, order="groups")
    same, slower = trial(5.0, order="groups", block_size=64), trial(6.0, block_size=64)
    better = trial(8.0, order="fcfs", block_size=128)
    advice = SimpleNamespace(own=own, pick=fast, trials=(own, fast, same, slower, better))
    assert worth_showing(advice, 9) == [fast, slower, better, own]
    assert worth_showing(advice, 1) == [fast, own]
    advice.pick = same
    assert worth_showing(advice, 2) == [fast, same, own]
