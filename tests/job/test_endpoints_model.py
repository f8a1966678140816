"""Rows of every endpoint on the real model, against the Python entry points."""

from typing import Any

import numpy as np
import pytest

from batchwright.job.answer import answer_form
from batchwright.job.formats.response_body import response_body
from batchwright.job.prepare import prepare_rows
from batchwright.job.rows import COMPLETIONS, EMBEDDINGS, SCORE, InputRow
from batchwright.job.validate import parse_row
from batchwright.llm import LLM
from batchwright.request import Request

pytestmark = pytest.mark.cpu

PAIRS = [("The capital of France is ", "Paris."), ("", "The sky is blue."), ("Two", " words")]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", max_num_batched_tokens=256)


def bodies(llm: LLM, *rows: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Run rows as a job does; their bodies in order."""
    parsed = [
        parse_row(InputRow(line, str(line), endpoint, body))
        for line, (endpoint, body) in enumerate(rows)
    ]
    forms, requests = {}, []
    for row, request in zip(parsed, prepare_rows(parsed, llm.tokenizer)):
        assert isinstance(request, Request), request
        forms[request.id] = answer_form(row, request)
        requests.append(request)
    made = {
        result.request_id: response_body(
            result, forms[result.request_id], llm.token_bytes, model="m", created=5
        )
        for result in llm.engine.run(requests)
    }
    return [made[str(line)] for line in range(len(rows))]


def test_scores_equal_those_of_llm(llm: LLM) -> None:
    rows = [(SCORE, {"context": before, "continuation": after}) for before, after in PAIRS]
    for body, result in zip(bodies(llm, *rows), llm.score(PAIRS)):
        assert result.score is not None
        (data,) = body["data"]
        assert data["token_logprobs"] == result.score.token_logprobs.tolist()
        assert data["logprob"] == pytest.approx(result.score.logprob, abs=1e-9)
        assert data["is_greedy"] is result.score.is_greedy
        assert data["num_tokens"] == len(result.score.token_logprobs)


def test_embeddings_are_those_of_llm_at_length_one(llm: LLM) -> None:
    texts = ["A cat.", "naïve café"]
    for pooling in ("mean", "last"):
        rows = [(EMBEDDINGS, {"input": text, "pooling": pooling}) for text in texts]
        raw = [(endpoint, body | {"normalize": False}) for endpoint, body in rows]
        for unit, plain, result in zip(
            bodies(llm, *rows), bodies(llm, *raw), llm.embed(texts, pooling)
        ):
            assert result.embedding is not None
            assert plain["data"][0]["embedding"] == result.embedding.tolist()
            vector = np.array(unit["data"][0]["embedding"])
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
            cosine = vector @ result.embedding / np.linalg.norm(result.embedding)
            assert cosine == pytest.approx(1, abs=1e-6)


def test_scoring_a_prompt_equals_echo_of_a_generated_row(llm: LLM) -> None:
    given = {"prompt": "Once upon a time, there", "echo": True, "logprobs": 3, "temperature": 0}
    scored, generated = bodies(
        llm, (COMPLETIONS, given | {"max_tokens": 0}), (COMPLETIONS, given | {"max_tokens": 1})
    )
    (choice,), (other,) = scored["choices"], generated["choices"]
    assert (choice["text"], choice["finish_reason"]) == (given["prompt"], "length")
    num_prompt = scored["usage"]["prompt_tokens"]
    assert scored["usage"]["completion_tokens"] == 0
    for name, values in choice["logprobs"].items():
        assert len(values) == num_prompt
        assert values == other["logprobs"][name][:num_prompt]
    assert all(len(top) >= 3 for top in choice["logprobs"]["top_logprobs"][1:])


def test_a_list_is_answered_as_its_entries_are(llm: LLM) -> None:
    texts = ["A cat.", "naïve café", "A cat.", "Once upon a time there was a"]
    ids = [llm.tokenizer.encode(texts[0]), *texts[1:]]
    singles = bodies(llm, *((EMBEDDINGS, {"input": text}) for text in texts))
    (body,) = bodies(llm, (EMBEDDINGS, {"input": ids}))
    assert [data["index"] for data in body["data"]] == [0, 1, 2, 3]
    assert [data["embedding"] for data in body["data"]] == [
        single["data"][0]["embedding"] for single in singles
    ]
    num_tokens = sum(single["usage"]["total_tokens"] for single in singles)
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_a_list_of_prompts_has_its_choices_numbered_through(llm: LLM) -> None:
    texts = ["The capital of France is", "Once upon a time there was a"]
    rest = {"max_tokens": 5, "n": 2, "seed": 3, "logprobs": 1, "echo": True}
    singles = bodies(llm, *((COMPLETIONS, {"prompt": text, **rest}) for text in texts))
    (body,) = bodies(llm, (COMPLETIONS, {"prompt": texts, **rest}))
    expected = [choice for single in singles for choice in single["choices"]]
    for index, choice in enumerate(expected):
        choice["index"] = index
    assert body["choices"] == expected
    assert body["usage"]["completion_tokens"] == 20
    assert body["usage"]["prompt_tokens"] == sum(s["usage"]["prompt_tokens"] for s in singles)
    scoring = {"max_tokens": 0, "echo": True, "logprobs": 1}
    singles = bodies(llm, *((COMPLETIONS, {"prompt": text, **scoring}) for text in texts))
    (body,) = bodies(llm, (COMPLETIONS, {"prompt": texts, **scoring}))
    assert [c["logprobs"] for c in body["choices"]] == [
        s["choices"][0]["logprobs"] for s in singles
    ]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
