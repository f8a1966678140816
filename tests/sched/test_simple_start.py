"""Sequences that share nothing are started together; the Steps are those of one by one."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from batchwright.request import Task
from batchwright.sched.admission import Admission
from batchwright.step import Step
from tests.sched.harness import VOCAB_SIZE, Harness, family, smallest_pools

ARRAYS = [field.name for field in dataclasses.fields(Step) if field.name != "new_sequences"]


def job(seed: int) -> Harness:
    """Rows with prompts of their own, and some that share; more of each are added on the way."""
    draw = random.Random(seed)
    shared = [draw.randrange(VOCAB_SIZE) for _ in range(17)]
    families = []
    for order in range(24):
        prompt = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 30))]
        if draw.random() < 0.4:
            prompt = shared[: draw.randint(4, 17)] + prompt
        options = {"max_tokens": draw.randint(1, 9), "n": draw.choice([1, 1, 1, 3])}
        if len(prompt) > 1 and draw.random() < 0.2:
            options = {"task": Task.SCORE, "score_start": draw.randint(1, len(prompt) - 1)}
        families.append(family(order, prompt, end=draw.random() < 0.3, **options))
    windows = [[None], [6], [None, 6]][seed % 3]
    budget = draw.choice([9, 40, 100])
    pools = [num + draw.randint(0, 30) for num in smallest_pools(windows, families, budget)]
    harness = Harness(windows, pools, budget=budget, max_num_seqs=8, look_ahead=seed % 2)
    for first in families[:12]:
        assert harness.add(first)
    for first in families[12:]:
        harness.round()
        assert harness.add(first)
    harness.run()
    return harness


@pytest.mark.parametrize("seed", range(12))
def test_steps_are_those_of_one_by_one(seed, monkeypatch):
    num_simple = 0
    is_simple = Admission._is_simple

    def counted(self, sequence, budget):
        nonlocal num_simple
        simple = is_simple(self, sequence, budget)
        num_simple += simple
        return simple

    monkeypatch.setattr(Admission, "_is_simple", counted)
    together = job(seed).steps
    assert num_simple > 0, "nothing was started together"
    monkeypatch.setattr(Admission, "_is_simple", lambda self, sequence, budget: False)
    one_by_one = job(seed).steps
    assert len(together) == len(one_by_one)
    for ours, theirs in zip(together, one_by_one):
        for name in ARRAYS:
            np.testing.assert_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        assert [new.slot for new in ours.new_sequences] == [n.slot for n in theirs.new_sequences]
