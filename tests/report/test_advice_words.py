"""Which of the simulated settings are shown, and words for loads that cannot be served."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

from batchwright.job.advice import QueueAdvice
from batchwright.plan.advise.knobs import Knobs, Trial
from batchwright.plan.advise.single_queue import ClippedQueue
from batchwright.report.advice_words import queue_words, worth_showing

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


def queue(clipped: float, fixed_s: float) -> QueueAdvice:
    limit = ClippedQueue(3, 0.5, 0.01, 2.5, clipped)
    return QueueAdvice(1.0, (limit,), limit, 1.2, 1.1, 4, fixed_s, 0.1, 0.7, 0.7)


def test_a_limit_that_cuts_off_nearly_all_is_no_advice() -> None:
    few, batches, one = queue_words(queue(0.1, 2.0))
    assert few.startswith("1 request per second: answered after 0.10 s")
    assert batches.endswith("the best fixed size is 4, about 2.00 s")
    assert one.startswith("one at a time: max_tokens 3 cuts off 10% and waits 0.01 s")
    _, batches, one = queue_words(queue(0.9, math.inf))
    assert batches.endswith("no fixed size that was looked at keeps up")
    assert "keeps up only with max_tokens as low as 3, which cuts off 90%" in one
