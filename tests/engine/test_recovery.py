"""A step that fails ends the row that makes it fail, and nothing else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import batchwright
from batchwright.errors import ResourceError
from batchwright.folding import Folding
from batchwright.request import FinishReason
from batchwright.sched.admission import Admission
from batchwright.sched.books import Books
from batchwright.sched.scheduler import Scheduler
from tests.engine.symbolic_engine import (
    LetterTokenizer,
    answers,
    contents,
    finish,
    mixed_job,
    new_engine,
    row,
)

LOOK_AHEAD = pytest.mark.parametrize("look_ahead", [0, 1])
TIGHT = {"num_blocks": 24}


@pytest.fixture(scope="module")
def undisturbed():
    return answers(new_engine()[0], mixed_job())


def fail_calls(
    *numbers: int, error: Callable[[], BaseException] = lambda: RuntimeError("bad luck")
):
    calls = iter(range(10**9))

    def fault(step, ids):
        if next(calls) in numbers:
            raise error()

    return fault


def fail_with(*culprits: str):
    """Fail whenever all of these rows are in a step."""

    def fault(step, ids):
        if set(culprits) <= set(ids):
            raise ValueError("cannot compute\nthis second line is not for everyone")

    return fault


def assert_same(results, expected, *, but: set[str] = frozenset()):
    assert results.keys() == expected.keys()
    for id in results.keys() - but:
        assert contents(results[id]) == contents(expected[id]), id


@LOOK_AHEAD
@pytest.mark.parametrize("settings", [{}, TIGHT], ids=["", "tight"])
def test_one_failure_at_any_step_changes_no_row(undisturbed, look_ahead, settings):
    engine, executor = new_engine(look_ahead=look_ahead, **settings)
    answers(engine, mixed_job())
    for number in range(executor.num_calls):
        engine, executor = new_engine(look_ahead=look_ahead, **settings)
        executor.fault = fail_calls(number)
        assert_same(answers(engine, mixed_job()), undisturbed)
        assert executor.num_failures == 1


@LOOK_AHEAD
@pytest.mark.parametrize("culprit", [request.id for request in mixed_job()])
def test_the_row_that_fails_alone_fails_and_the_rest_go_on(undisturbed, look_ahead, culprit):
    engine, executor = new_engine(look_ahead=look_ahead)
    executor.fault = fail_with(culprit)
    results = answers(engine, mixed_job())
    assert_same(results, undisturbed, but={culprit})
    error = results[culprit].error
    assert error.code == "internal_error" and not results[culprit].outputs
    assert "ValueError: cannot compute" in error.message and "second line" not in error.message
    assert executor.num_failures <= 1 + 2 * 3, "halves of six rows: three levels"


@LOOK_AHEAD
def test_a_row_that_fails_late_keeps_the_others_tokens(undisturbed, look_ahead):
    engine, executor = new_engine(look_ahead=look_ahead)

    def fault(step, ids):
        for index, slot in enumerate(step.slots.tolist()):
            sequence = engine._scheduler.books.slots.sequences[slot]
            last = int(step.positions[step.cu_seqlens_q[index + 1] - 1])
            if sequence.request.id == "r7" and last >= sequence.num_prompt_tokens + 3:
                raise ValueError("late")

    executor.fault = fault
    results = answers(engine, mixed_job())
    assert results["r7"].error.code == "internal_error"
    assert_same(results, undisturbed, but={"r7"})


@LOOK_AHEAD
def test_rows_that_fail_only_together_end_well(undisturbed, look_ahead):
    for pair in [("r0", "r1"), ("r2", "samples"), ("mean", "score")]:
        engine, executor = new_engine(look_ahead=look_ahead)
        executor.fault = fail_with(*pair)
        assert_same(answers(engine, mixed_job()), undisturbed)


@LOOK_AHEAD
def test_recoveries_are_bounded_if_everything_fails(look_ahead):
    engine, executor = new_engine(look_ahead=look_ahead)
    executor.fault = fail_with()
    results = answers(engine, mixed_job())
    assert {result.error.code for result in results.values()} == {"internal_error"}
    assert executor.num_calls == executor.num_failures <= 2 * len(results)


def test_other_rows_hold_while_suspects_are_tried():
    engine, executor = new_engine(max_num_seqs=4)
    executor.fault = fail_with("r1")
    answers(engine, mixed_job())
    first = next(i for i, (_, ids) in enumerate(executor.steps) if "r1" in ids)
    suspects = set(executor.steps[first][1])
    for _, ids in executor.steps[first + 1 :]:
        if not set(ids) <= suspects:
            break
        assert len(ids) < len(suspects)
    assert sum(set(ids) <= suspects for _, ids in executor.steps[first + 1 :]) > 3


@LOOK_AHEAD
@pytest.mark.parametrize(
    ("part", "method"),
    [
        *((Scheduler, name) for name in ("update", "schedule", "finish")),
        (Admission, "_start"),
        (Books, "leave"),
    ],
)
def test_a_scheduler_that_fails_half_way_changes_no_row(
    undisturbed, look_ahead, part, method, monkeypatch
):
    """Our own bugs: the books are torn, and made anew."""
    whole = getattr(part, method)
    for number in range(0, 40, 3):
        calls = iter(range(10**9))

        def torn(self, *arguments, calls=calls, number=number, **options):
            result = whole(self, *arguments, **options)
            if next(calls) == number:
                raise AssertionError("a bug")
            return result

        monkeypatch.setattr(part, method, torn)
        engine, _ = new_engine(look_ahead=look_ahead)
        assert_same(answers(engine, mixed_job()), undisturbed)


def test_text_that_cannot_be_made_fails_its_row_without_recovery(undisturbed, monkeypatch):
    bad = undisturbed["r5"].outputs[0].token_ids
    decode = LetterTokenizer.decode

    def fussy(self, ids, **options):
        if list(ids) in (bad, bad[:-1]):
            raise UnicodeError("no text")
        return decode(self, ids, **options)

    monkeypatch.setattr(LetterTokenizer, "decode", fussy)
    engine, executor = new_engine()
    results = answers(engine, mixed_job())
    assert results["r5"].error.code == "internal_error"
    assert_same(results, undisturbed, but={"r5"})
    assert executor.num_failures == 0


def test_a_stop_checker_that_fails_ends_its_row_only(undisturbed, monkeypatch):
    def broken(self, token_ids):
        raise IndexError

    monkeypatch.setattr("batchwright.text.detokenizer.StopStringChecker.append", broken)
    results = answers(new_engine(look_ahead=1)[0], mixed_job())
    assert "IndexError" in results["stop"].error.message
    assert_same(results, undisturbed, but={"stop"})


# Out of memory --------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@LOOK_AHEAD
@pytest.mark.parametrize(
    "error",
    [
        MemoryError,
        lambda: OutOfMemoryError("CUDA"),
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 5 bytes"),
        lambda: OSError(12, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_blames_no_row(undisturbed, look_ahead, error, caplog):
    engine, executor = new_engine(look_ahead=look_ahead)

    def fault(step, ids):
        if step.num_tokens > 20 or step.num_rows > 3:
            raise error()

    executor.fault = fault
    with caplog.at_level(logging.WARNING):
        assert_same(answers(engine, mixed_job()), undisturbed)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == executor.num_failures <= 3
    assert all("memory ran out" in warning for warning in warnings)
    assert engine._scheduler.limits.max_running in (1, 3)


@LOOK_AHEAD
def test_steps_grow_again_when_memory_is_there_again(undisturbed, look_ahead, monkeypatch):
    monkeypatch.setattr("batchwright.sched.limits.FIRST_WAIT_STEPS", 4)
    engine, executor = new_engine(look_ahead=look_ahead)
    limits, seen = engine._scheduler.limits, []

    def fault(step, ids):
        seen.append((limits.max_running, limits.max_tokens))
        if len(seen) < 20 and step.num_rows > 1:
            raise MemoryError

    executor.fault = fault
    assert_same(answers(engine, mixed_job()), undisturbed)
    assert min(seen) == (1, 16)
    assert seen[-1] == (6, 30)
    assert 3 <= executor.num_failures <= 6


def test_an_error_that_is_no_lack_of_memory_blames_a_row():
    engine, executor = new_engine()
    executor.fault = fail_calls(0, 1, 2, 3, 4, 5, error=lambda: RuntimeError("no memory of this"))
    results = answers(engine, mixed_job())
    assert any(result.error for result in results.values())
    assert engine._scheduler.limits.max_running == 6


def test_no_memory_for_one_row_is_one_clear_error_and_loses_nothing(undisturbed):
    engine, executor = new_engine()
    for request in mixed_job():
        engine.add(request)
    results = {}
    while len(results) < 3:
        results |= {result.request_id: result for result in engine.step()}
    executor.fault = fail_calls(*range(1000), error=MemoryError)
    while engine._scheduler.limits.halve():
        pass
    with pytest.raises(ResourceError, match="one row in steps of 16 tokens"):
        engine.step()
    with pytest.raises(ResourceError):
        engine.step()
    executor.fault = lambda step, ids: None  # memory is there again
    assert_same(finish(engine, results), undisturbed)


# Interruptions --------------------------------------------------------------------------------

DECIDING = tuple(
    str(Path(batchwright.__file__).parent / name)
    for name in ("engine.py", "open_requests.py", "sched", "kv", "plan")
)


class InterruptAt:
    """Raises at the n-th line that runs in the deciding layers, as Ctrl-C may."""

    def __init__(self, number: int, error: type[BaseException]) -> None:
        self.left, self.error = number, error

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(DECIDING):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise self.error
        return self


@LOOK_AHEAD
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_and_the_engine_can_go_on(undisturbed, look_ahead, error):
    number, num_interrupts = 1, 0
    while True:
        engine, _ = new_engine(look_ahead=look_ahead)
        for request in mixed_job():
            engine.add(request)
        results, before = {}, sys.gettrace()
        try:
            sys.settrace(InterruptAt(number, error))
            try:
                while engine.num_unfinished:
                    for result in engine.step():
                        results[result.request_id] = result
            finally:
                sys.settrace(before)
        except error:
            num_interrupts += 1
        else:
            break
        assert_same(finish(engine, results), undisturbed)
        number += 331  # a prime: over all runs every kind of place is met
    assert num_interrupts > 35


def test_an_interrupt_while_a_request_is_answered_loses_and_doubles_nothing(
    undisturbed, monkeypatch
):
    close, calls = Folding.close, iter(range(10**9))

    def interrupted(self, request_id, result):
        if next(calls) % 2 == 0:
            raise KeyboardInterrupt
        close(self, request_id, result)

    monkeypatch.setattr(Folding, "close", interrupted)
    engine, _ = new_engine()
    for request in mixed_job():
        engine.add(request)
    results, num_interrupts = {}, 0
    while engine.num_unfinished:
        try:
            for result in engine.step():
                assert result.request_id not in results, "answered twice"
                results[result.request_id] = result
        except KeyboardInterrupt:
            num_interrupts += 1
    assert_same(results, undisturbed)
    assert num_interrupts > 3


def test_a_run_that_was_interrupted_leaves_an_engine_for_the_next(undisturbed):
    for number in range(0, 12, 3):
        engine, executor = new_engine(look_ahead=1)
        executor.fault = fail_calls(number, error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            list(engine.run(mixed_job()))
        assert engine.num_unfinished == 0
        assert_same({r.request_id: r for r in engine.run(mixed_job())}, undisturbed)
        engine.check_integrity()


def test_rows_can_be_cancelled_while_suspects_are_tried(undisturbed):
    for victim in ("r0", "r3", "r7", "samples", "mean"):
        engine, executor = new_engine(max_num_seqs=8)
        executor.fault = fail_with("r2")
        for request in mixed_job():
            engine.add(request)
        results = {r.request_id: r for _ in range(2) for r in engine.step()}
        assert executor.num_failures
        engine.cancel(victim)
        finish(engine, results)
        assert_same(results, undisturbed, but={"r2", victim})
        cancelled = [o.finish_reason is FinishReason.CANCELLED for o in results[victim].outputs]
        assert all(cancelled) or results[victim].error.code == "cancelled"


def test_rows_added_while_suspects_are_tried_wait_and_run(undisturbed):
    engine, executor = new_engine()
    executor.fault = fail_with("r2")
    job = mixed_job()
    for request in job[:4]:
        engine.add(request)
    results = {r.request_id: r for _ in range(2) for r in engine.step()}
    for request in job[4:]:
        engine.add(request)
    assert_same(finish(engine, results), undisturbed, but={"r2"})


def test_suspects_of_one_run_do_not_hold_up_the_next(undisturbed, caplog):
    """The first run ends with suspects that were tried last."""
    engine, executor = new_engine()
    executor.fault = fail_with("r1")
    job = mixed_job()[:3]
    assert [r.request_id for r in engine.run(job) if r.error is not None] == ["r1"]
    executor.fault = fail_calls()
    caplog.clear()
    results = {r.request_id: r for r in engine.run(job)}
    assert_same(results, {request.id: undisturbed[request.id] for request in job})
    assert not caplog.records


def test_the_comparison_can_fail(undisturbed):
    job = [row("r0", [1, 2, 3], 5), *mixed_job()[1:]]
    with pytest.raises(AssertionError):
        assert_same(answers(new_engine()[0], job), undisturbed)
    assert np.array_equal([len(undisturbed)], [len(job)])
