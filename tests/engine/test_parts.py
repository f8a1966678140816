"""Requests made of parts: answered once, as their parts would be alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from batchwright.errors import RequestError
from batchwright.parts import part_id
from batchwright.request import FinishReason, Request, Task
from tests.engine.symbolic_engine import answers, contents, finish, mixed_job, new_engine, row

PROMPTS = [[5, 6, 7], [5, 6, 7, 8], [9], [5, 6, 7]]


def several(id: str, prompts=PROMPTS, **fields) -> Request:
    parts = [row(part_id(id, index), prompt, **fields) for index, prompt in enumerate(prompts)]
    empty = np.empty(0, np.int32)
    return dataclasses.replace(parts[0], id=id, prompt_token_ids=empty, parts=tuple(parts))


@pytest.mark.parametrize(
    "fields",
    [{}, {"n": 3}, {"task": Task.EMBED}, {"task": Task.SCORE, "score_start": 1}],
    ids=["one", "n", "embed", "score"],
)
def test_the_answer_is_that_of_the_parts(fields) -> None:
    prompts = PROMPTS if "score_start" not in fields else [[5, 6], [7, 8, 9]]
    request = several("x", prompts, **fields)
    alone = answers(new_engine()[0], request.parts)
    engine, _ = new_engine()
    results = answers(engine, [*mixed_job(), request, several("y", prompts, **fields)])
    assert results.keys() == {r.id for r in mixed_job()} | {"x", "y"}
    result = results["x"]
    assert result.error is None
    for index, part in enumerate(request.parts):
        expected = alone[part.id]
        first = index * len(expected.outputs)
        expected.outputs = [
            dataclasses.replace(output, index=first + output.index) for output in expected.outputs
        ]
        assert contents(result.parts[index]) == contents(expected)
    assert [output.index for output in result.outputs] == list(range(len(result.outputs)))
    assert result.prompt_token_ids == [token for prompt in prompts for token in prompt]
    assert request.num_prompt_tokens == len(result.prompt_token_ids)
    assert not engine._parts


@pytest.mark.parametrize("bad", [0, 2])
def test_one_bad_part_fails_the_request_and_nothing_else(bad: int) -> None:
    prompts = [*PROMPTS]
    prompts[bad] = [10**6]
    engine, _ = new_engine()
    results = answers(engine, [row("a", [1, 2]), several("x", prompts), row("b", [3])])
    assert results["a"].error is None and results["b"].error is None
    error = results["x"].error
    assert error is not None
    assert error.message.startswith(f"entry {bad} of the list: prompt has token id 1000000")
    long = several("long", [[1], [2] * 10**4])
    error = answers(engine, [long])["long"].error
    assert error is not None and error.code == "context_length_exceeded"
    assert "(custom_id=long)" in error.message


def test_a_part_that_breaks_steps_fails_the_request_alone() -> None:
    engine, executor = new_engine()

    def fault(step, ids) -> None:
        if part_id("x", 1) in ids:
            raise ValueError("cannot compute")

    executor.fault = fault
    results = answers(engine, [*mixed_job(), several("x")])
    assert [id for id, result in results.items() if result.error] == ["x"]
    error = results["x"].error
    assert error is not None and error.code == "internal_error"
    assert error.message.startswith("entry 1 of the list")
    assert not results["x"].outputs  # parts that were cancelled for it are no answer


def test_cancelling_ends_all_parts() -> None:
    engine, _ = new_engine()
    for request in (several("x", max_tokens=20), several("e", task=Task.EMBED), row("a", [1])):
        engine.add(request)
    engine.cancel("e")
    results = {result.request_id: result for _ in range(2) for result in engine.step()}
    engine.cancel("x")
    finish(engine, results)
    assert any(o.finish_reason is FinishReason.CANCELLED for o in results["x"].outputs)
    assert results["e"].error is not None and results["e"].error.code == "cancelled"
    assert results["a"].error is None


def test_it_waits_until_one_part_has_started() -> None:
    engine, _ = new_engine(max_num_seqs=2)
    for request in (row("a", [1]), several("x", [[2], [3], [4]]), several("y", [[5], [6]])):
        engine.add(request)
    assert engine.waiting_ids() == ["a", "x", "y"]
    engine.step()
    assert engine.waiting_ids() == ["y"]
    assert finish(engine).keys() == {"a", "x", "y"}


def test_ids_stay_unique() -> None:
    engine, _ = new_engine()
    engine.add(several("x"))
    with pytest.raises(RequestError, match="already running"):
        engine.add(row("x", [1]))
    assert finish(engine).keys() == {"x"}
