"""A row that makes a step fail, on one rank or on all, fails alone; the others get their tokens."""

from __future__ import annotations

import os
import signal

import pytest

from batchwright import llm
from batchwright.engine import Engine
from batchwright.tensor_parallel.followers import Followers
from batchwright.tensor_parallel.ranks import LostRanksError
from tests.engine.harness import mixed_job, request, run
from tests.models.reference import make_checkpoint
from tests.tensor_parallel import failing
from tests.tensor_parallel.conftest import lasting

pytestmark = pytest.mark.cpu

EVEN = {"intermediate_size": 38}
SETTINGS = {"max_num_batched_tokens": 64, "max_num_seqs": 6, "tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def failing_ranks():
    yield from lasting(2, failing.PROGRAM)


@pytest.fixture
def steps_given_up(failing_ranks, monkeypatch):
    """Both ranks, in which rows fail; the causes of failed steps."""
    causes: list[Exception] = []
    give_up = Followers.give_up_step

    def note(self, error):
        causes.append(give_up(self, error))
        return causes[-1]

    monkeypatch.setattr(Followers, "give_up_step", note)
    monkeypatch.setattr(llm, "Followers", lambda size, *, on_gpu: failing_ranks)
    failing.break_rows(is_follower=False, replace=monkeypatch.setattr)
    return causes


def with_bad_rows(token: int, num_bad: int) -> list:
    job = mixed_job()
    for index in range(num_bad):
        job.insert(4 + 3 * index, request(f"bad{index}", [token] * 3 + [5, 6 + index]))
    return job


@pytest.mark.parametrize("name", ["llama_biased", "mixtral"])
@pytest.mark.parametrize(
    ("token", "words"),
    [
        (failing.RANK_0, "ValueError: a bug on rank 0"),
        (failing.RANK_1, "RuntimeError: rank 1: ValueError: a bug on rank 1"),
        (failing.ALL_RANKS, "ValueError: a bug on rank 0"),
        (failing.DRAWING, "ValueError: a bug in drawing"),
    ],
)
@pytest.mark.parametrize("look_ahead", [0, 1])
def test_it_fails_alone(name, token, words, look_ahead, tmp_path, steps_given_up):
    make_checkpoint(name, tmp_path, **EVEN)
    settings = {**SETTINGS, "look_ahead": look_ahead}
    expected = run(tmp_path, mixed_job(), **settings)
    assert not steps_given_up
    found = run(tmp_path, with_bad_rows(token, 2), **settings)
    assert len(steps_given_up) > 2, "groups were halved"
    for id in ("bad0", "bad1"):
        error = found.results.pop(id).error
        assert error.code == "internal_error" and words in error.message
        assert "other rows are not affected" in error.message
    assert found.tokens() == expected.tokens()
    assert {key: found.logits[key] for key in expected.logits} == expected.logits
    again = run(tmp_path, mixed_job()[::-1], **settings)
    assert again.tokens() == expected.tokens()


def test_lack_of_memory_on_one_rank_makes_steps_smaller(tmp_path, steps_given_up):
    make_checkpoint("llama", tmp_path, **EVEN)
    expected = run(tmp_path, with_bad_rows(failing.MEMORY, 1), max_num_seqs=6)
    found = run(tmp_path, with_bad_rows(failing.MEMORY, 1), **SETTINGS)
    assert steps_given_up and all(isinstance(cause, MemoryError) for cause in steps_given_up)
    assert "rank 1: MemoryError: no room" in str(steps_given_up[0])
    assert found.tokens() == expected.tokens()


def test_three_ranks_break_off_for_one_and_meet_again(tmp_path, monkeypatch):
    """The third waits for neither of the others in vain."""
    make_checkpoint("llama", tmp_path, num_key_value_heads=3, intermediate_size=39)
    settings = {**SETTINGS, "tensor_parallel_size": 3}
    for ranks in lasting(3, failing.PROGRAM):
        monkeypatch.setattr(llm, "Followers", lambda size, *, on_gpu, ranks=ranks: ranks)
        failing.break_rows(is_follower=False, replace=monkeypatch.setattr)
        expected = run(tmp_path, mixed_job(), **settings)
        for token in (failing.RANK_0, failing.RANK_1, failing.ALL_RANKS):
            found = run(tmp_path, with_bad_rows(token, 1), **settings)
            assert found.results.pop("bad0").error.code == "internal_error"
            assert found.tokens() == expected.tokens()


def test_without_a_cause_or_a_follower_it_is_the_end():
    for kill in (False, True):
        followers = Followers(2, on_gpu=False)
        (follower,) = followers._followers
        if kill:
            os.kill(follower.process.pid, signal.SIGKILL)
        error = followers.give_up_step(LostRanksError("gone"))
        words = "rank 1 was ended by signal 9" if kill else "rank 0 failed: LostRanksError: gone"
        assert str(error).startswith(words)
        assert follower.process.poll() is not None


def test_what_fails_before_a_step_is_sent_needs_no_meeting(
    tmp_path, failing_ranks, steps_given_up, monkeypatch
):
    """Between GPUs too, where ranks do not meet again."""
    make_checkpoint("llama", tmp_path, **EVEN)
    monkeypatch.setattr(failing_ranks, "_on_gpu", True)
    masked = Engine._masked

    def fail(self, step):
        if "bad0" in self._scheduler.requests_of(step):
            raise ValueError("a bug in masks")
        return masked(self, step)

    monkeypatch.setattr(Engine, "_masked", fail)
    found = run(tmp_path, with_bad_rows(5, 1), **SETTINGS)
    assert "a bug in masks" in found.results.pop("bad0").error.message
    assert not steps_given_up
    monkeypatch.undo()
    assert found.tokens() == run(tmp_path, mixed_job(), max_num_seqs=6).tokens()
