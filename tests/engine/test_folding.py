"""Identical rows are computed once and answered each."""

from __future__ import annotations

import dataclasses

import pytest

from batchwright.errors import RequestError
from batchwright.folding import Folding, answer_as, fold_key
from batchwright.prompt_layout import PromptLayout
from batchwright.request import FinishReason, Request, Result, SamplingParams, Task
from tests.engine.symbolic_engine import answers, contents, finish, new_engine, row

PROMPT = [5, 6, 7, 8, 9]


def copies(num: int, *, n: int = 2, **fields) -> list[Request]:
    return [dataclasses.replace(row("x", PROMPT, n=n, **fields), id=f"c{i}") for i in range(num)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"seed": 3, "temperature": 1.0},
        {"task": Task.SCORE, "score_start": 2, "temperature": 1.0},
        {"task": Task.EMBED, "pooling": "last"},
        {"logit_bias": {4: 1.0}, "stop": (chr(0x4E00 + 30),)},
    ],
    ids=["greedy", "seed", "score", "embed", "bias and stop"],
)
def test_identical_rows_are_computed_once(fields):
    alone, executor = new_engine()
    expected = contents(answers(alone, copies(1, **fields))["c0"])
    num_calls = executor.num_calls
    engine, executor = new_engine()
    results = answers(engine, copies(5, **fields))
    assert {id: contents(result) for id, result in results.items()} == dict.fromkeys(
        [f"c{i}" for i in range(5)], expected
    )
    assert (executor.num_calls, engine.stats.num_folded) == (num_calls, 4)
    assert {id: result.request_id for id, result in results.items()} == {id: id for id in results}
    # those that come later are answered at once
    engine.add(dataclasses.replace(copies(1, **fields)[0], id="late", prompt="text"))
    [late] = engine.step()
    assert (late.request_id, late.prompt, contents(late)) == ("late", "text", expected)
    assert late.num_cached_tokens == len(PROMPT)
    assert (executor.num_calls, engine.stats.num_folded) == (num_calls, 5)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_token_ids": row("x", [5, 6, 7, 8, 10]).prompt_token_ids},
        {"params": SamplingParams(temperature=0.0, max_tokens=7)},
        {"params": SamplingParams(temperature=0.0, max_tokens=8, logit_bias={4: 1.0})},
        {"namespace": "other"},
        {"task": Task.EMBED},
    ],
)
def test_rows_that_differ_are_not_folded(change):
    first = row("a", PROMPT)
    engine, _ = new_engine()
    answers(engine, [first, dataclasses.replace(first, id="b", **change)])
    assert engine.stats.num_folded == 0


def test_every_field_that_counts_is_in_the_key():
    request = row("a", PROMPT)
    fields = {field.name for field in dataclasses.fields(Request)}
    fields -= {"id", "prompt", "parts"}  # parts are folded, not the request made of them
    others = {
        "prompt_token_ids": row("x", [1]).prompt_token_ids,
        "params": SamplingParams(temperature=0.0, max_tokens=9),
        "task": Task.SCORE,
        "score_start": 2,
        "pooling": "last",
        "namespace": "n",
        "layout": PromptLayout((), ((3, len(PROMPT)),)),
        "markup": dataclasses.replace(request.markup, reasons=True),
        "urgent": True,  # else it would wait for a row that is not
    }
    assert fields == others.keys(), "a new field must be part of the key, or named here"
    for name, value in others.items():
        assert fold_key(dataclasses.replace(request, **{name: value})) != fold_key(request), name
    assert fold_key(dataclasses.replace(request, id="b", prompt="text")) == fold_key(request)
    assert fold_key(dataclasses.replace(request, params=SamplingParams())) is None


def test_rows_with_noise_of_their_own_are_never_folded():
    assert fold_key(row("a", PROMPT, temperature=0.5)) is None
    engine, _ = new_engine()
    answers(engine, [row("a", PROMPT, temperature=0.5), row("b", PROMPT, temperature=0.5)])
    assert engine.stats.num_folded == 0


def test_ids_stay_unique():
    engine, _ = new_engine()
    for request in copies(2):
        engine.add(request)
    for id in ("c0", "c1"):
        with pytest.raises(RequestError, match="already running"):
            engine.add(row(id, [1]))
    finish(engine)
    engine.add(row("c0", PROMPT, n=2))  # answered at once, not returned yet
    with pytest.raises(RequestError, match="already running"):
        engine.add(row("c0", PROMPT, n=2))
    assert engine.num_unfinished == 1


@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("look_ahead", [0, 1])
def test_a_cancelled_leader_hands_over(num_steps, look_ahead):
    expected = contents(answers(new_engine()[0], copies(1))["c0"])
    engine, executor = new_engine(look_ahead=look_ahead)
    for request in copies(4):
        engine.add(request)
    for _ in range(num_steps):
        assert engine.step() == []
    for id in ("c0", "c2", "c1"):  # leader, follower, new leader
        engine.cancel(id)
    results = finish(engine)
    assert contents(results["c3"]) == expected
    for id in ("c0", "c1", "c2"):
        outputs = results[id].outputs
        assert [o.finish_reason for o in outputs] == [FinishReason.CANCELLED] * 2
    assert engine.stats.num_folded == 0, "one row was answered, with its own computation"
    assert max(len(ids) for _, ids in executor.steps) == 1


def test_a_cancelled_leader_without_followers_is_forgotten():
    engine, _ = new_engine()
    engine.add(row("a", PROMPT))
    engine.step()
    engine.cancel("a")
    results = finish(engine)
    assert results["a"].outputs[0].finish_reason is FinishReason.CANCELLED
    later = answers(engine, [row("b", PROMPT)])["b"]
    assert later.error is None and later.outputs[0].finish_reason is not FinishReason.CANCELLED
    assert engine.stats.num_folded == 0


def test_followers_of_a_waiting_leader_wait():
    engine, _ = new_engine(max_num_seqs=1)
    for request in [row("first", [1, 2]), *copies(2, n=1)]:
        engine.add(request)
    engine.step()
    assert engine.waiting_ids() == ["c0", "c1"]
    for id in engine.waiting_ids():
        engine.cancel(id)
    assert finish(engine).keys() == {"first", "c0", "c1"}


def test_followers_get_their_leaders_error_and_it_is_not_kept():
    engine, executor = new_engine()

    def fault(step, ids):
        if "c0" in ids:
            raise ValueError("no")

    executor.fault = fault
    results = answers(engine, copies(3))
    assert {result.error.code for result in results.values()} == {"internal_error"}
    assert executor.num_failures == 2, "a failed leader is not tried again for its followers"
    executor.fault = lambda step, ids: None
    assert answers(engine, [row("again", PROMPT, n=2)])["again"].error is None


def test_suspects_can_hand_over():
    engine, executor = new_engine()

    def fault(step, ids):
        if {"other", "c0"} <= set(ids):
            raise ValueError("no")

    executor.fault = fault
    for request in [row("other", [1, 2, 3]), *copies(2)]:
        engine.add(request)
    engine.step()
    assert executor.num_failures == 1
    engine.cancel("c0")
    results = finish(engine)
    assert contents(results["c1"]) == contents(answers(new_engine()[0], copies(1))["c0"])


def test_a_new_run_computes_anew():
    engine, executor = new_engine()
    for _ in range(2):
        calls = executor.num_calls
        assert len(list(engine.run(copies(2)))) == 2
        assert executor.num_calls > calls
    assert engine.stats.num_folded == 2


def result_of(size: int) -> Result:
    return Result(request_id="r", prompt_token_ids=[1] * size)


def test_kept_results_are_bounded_by_number_and_bytes():
    folding = Folding(max_results=3)
    for i in range(5):
        folding.lead(i, str(i))
        folding.close(str(i), result_of(1))
        folding.recall(2)
    assert [folding.recall(i) is not None for i in range(5)] == [False, False, True, True, True]
    folding = Folding(max_bytes=60_000)
    for i in range(5):
        folding.lead(i, str(i))
        folding.close(str(i), result_of(1000))
    assert [folding.recall(i) is not None for i in range(5)] == [False, False, True, True, True]
    folding.lead(9, "9")
    folding.close("9", result_of(100_000))
    assert folding.recall(9) is None, "one that is too large is not kept"


def test_answers_do_not_share_what_callers_may_change():
    result = answers(new_engine()[0], copies(1))["c0"]
    other = answer_as(copies(2)[1], result)
    other.outputs[0].text = "changed"
    other.outputs.pop()
    assert len(result.outputs) == 2 and result.outputs[0].text != "changed"
