"""Embedding, score and prompt-scoring rows, from body to Request to response body."""

import base64
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st

from batchwright.errors import RequestError
from batchwright.job.answer import answer_form
from batchwright.job.formats.response_body import response_body
from batchwright.job.prepare import prepare_rows
from batchwright.job.rows import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    SCORE,
    SCORE_ALIAS,
    InputRow,
    endpoint_of_bare_row,
)
from batchwright.job.validate import ParsedRow, parse_row
from batchwright.request import (
    Completion,
    FinishReason,
    Markup,
    Request,
    Result,
    Score,
    Task,
    TokenLogprob,
)
from tests.job.fakes import BOS, ByteTokenizer, token_bytes

TOOLS = [{"type": "function", "function": {"name": "f"}}]
USER = [{"role": "user", "content": "Hi"}]


def parse(endpoint: str, **body: Any) -> ParsedRow:
    return parse_row(InputRow(3, "r", endpoint, body))


def prepare(endpoint: str, *, markup: Markup | None = None, **body: Any) -> Request:
    tokenizer = ByteTokenizer()
    if markup is not None:
        tokenizer.chat_markup = markup
    (found,) = prepare_rows([parse(endpoint, **body)], tokenizer)
    if isinstance(found, RequestError):
        raise found
    return found


def answered(
    endpoint: str, given: dict[str, Any], *, markup: Markup | None = None, **result: Any
) -> dict[str, Any]:
    """The response body of a row for a made-up result."""
    row, request = parse(endpoint, **given), prepare(endpoint, markup=markup, **given)
    made = Result(
        request_id="r",
        prompt_token_ids=request.prompt_token_ids.tolist(),
        prompt=request.prompt,
        **result,
    )
    body = response_body(made, answer_form(row, request), token_bytes, model="m", created=5)
    return msgspec.json.decode(msgspec.json.encode(body))


def said(text: str, reason: FinishReason = FinishReason.STOP) -> list[Completion]:
    return [Completion(index=0, text=text, token_ids=[1, 2], finish_reason=reason)]


def test_rows_without_url_are_told_by_their_content() -> None:
    bodies = [{"messages": []}, {"prompt": ""}, {"input": ""}, {"context": "", "continuation": ""}]
    assert [endpoint_of_bare_row(body) for body in bodies] == [CHAT, COMPLETIONS, EMBEDDINGS, SCORE]


@pytest.mark.parametrize("given", ["Hi", ["Hi"]])
def test_an_embedding_row(given: Any) -> None:
    request = prepare(EMBEDDINGS, input=given, user="u", model="m")
    assert (request.task, request.pooling) == (Task.EMBED, "mean")
    assert request.prompt_token_ids.tolist() == [BOS, *b"Hi"]


def test_a_list_of_inputs_becomes_parts() -> None:
    request = prepare(EMBEDDINGS, input=["Hi", [5, 6], "yo"], pooling="last")
    assert [part.prompt_token_ids.tolist() for part in request.parts] == [
        [BOS, *b"Hi"],
        [5, 6],
        [BOS, *b"yo"],
    ]
    assert {part.pooling for part in request.parts} == {"last"}
    assert len({request.id, *(part.id for part in request.parts)}) == 4
    with pytest.raises(RequestError, match="entry 1 of the list: the text has a char") as caught:
        prepare(COMPLETIONS, prompt=["Hi", "\0"])
    assert caught.value.line == 3


def test_an_embedding_of_token_ids_by_the_last_token() -> None:
    for given in ([5, 6], [[5, 6]]):
        request = prepare(EMBEDDINGS, input=given, pooling="last")
        assert request.prompt_token_ids.tolist() == [5, 6]
        assert request.pooling == "last"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "is missing"),
        ({"input": ["a", None]}, "input[1]", "must be a string"),
        ({"input": [[1], []]}, "input[1]", "is empty"),
        ({"input": []}, "input", "is empty"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": 5}, "input", "must be a string"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format", "float, base64"),
        ({"input": "x", "pooling": ["mean"]}, "pooling", "mean, last"),
        ({"input": "x", "dimensions": 64}, "dimensions", "hidden size"),
        ({"input": "x", "normalize": 1}, "normalize", "true or false"),
        ({"input": "x", "temperature": 1}, "temperature", "unknown parameter"),
    ],
)
def test_refused_embeddings(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(EMBEDDINGS, **body)
    assert (caught.value.param, caught.value.line) == (param, 3)
    assert words in caught.value.message


def test_embedding_bodies() -> None:
    vector = np.array([3.0, 0.0, -4.0], np.float32)
    unit = [np.float32(0.6), 0.0, np.float32(-0.8)]
    body = answered(EMBEDDINGS, {"input": "Hi"}, embedding=vector)
    assert (body["object"], body["model"]) == ("list", "m")
    assert body["data"] == [{"object": "embedding", "index": 0, "embedding": unit}]
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    body = answered(EMBEDDINGS, {"input": "Hi", "normalize": False}, embedding=vector)
    assert body["data"][0]["embedding"] == [3.0, 0.0, -4.0]
    body = answered(EMBEDDINGS, {"input": "Hi", "encoding_format": "base64"}, embedding=vector)
    decoded = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")
    assert decoded.tolist() == unit
    body = answered(EMBEDDINGS, {"input": "Hi"}, embedding=np.zeros(3, np.float32))
    assert body["data"][0]["embedding"] == [0.0] * 3


@pytest.mark.parametrize("endpoint", [SCORE, SCORE_ALIAS])
def test_a_score_row(endpoint: str) -> None:
    request = prepare(endpoint, context="Two ", continuation="words")
    assert request.task is Task.SCORE
    assert request.prompt_token_ids.tolist() == [BOS, *b"Two words"]
    assert request.score_start == 4  # the space goes to the continuation
    request = prepare(endpoint, context="", continuation="words")
    assert (request.prompt_token_ids.tolist(), request.score_start) == ([BOS, *b"words"], 1)
    request = prepare(endpoint, context=[7, 8], continuation=[9])
    assert (request.prompt_token_ids.tolist(), request.score_start) == ([7, 8, 9], 2)
    request = prepare(endpoint, context=[7, 8], continuation="a")
    assert (request.prompt_token_ids.tolist(), request.score_start) == ([7, 8, 97], 2)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"context": "a"}, "continuation", "is missing"),
        ({"continuation": "a"}, "context", "is missing"),
        ({"context": "a", "continuation": ""}, "continuation", "is empty"),
        ({"context": "a", "continuation": []}, "continuation", "is empty"),
        ({"context": 5, "continuation": "a"}, "context", "must be a string"),
        ({"context": ["a"], "continuation": "a"}, "context", "text of 1 characters at index 0"),
        ({"text_1": "a", "text_2": "b"}, "text_1", "give context and continuation"),
        ({"context": "a", "continuation": "b", "max_tokens": 1}, "max_tokens", "unknown"),
    ],
)
def test_refused_scores(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(SCORE, **body)
    assert caught.value.param == param
    assert words in caught.value.message


def test_a_pair_that_cannot_be_encoded_fails_alone() -> None:
    rows = [parse(SCORE, context=text, continuation="x") for text in ("a", "\0", "b")]
    found = prepare_rows(rows, ByteTokenizer())
    assert [isinstance(item, RequestError) for item in found] == [False, True, False]


def test_a_score_body() -> None:
    score = Score(token_logprobs=np.array([-0.5, -np.inf], np.float32), is_greedy=False)
    body = answered(SCORE, {"context": "a", "continuation": "bc"}, score=score)
    assert body["object"] == "score"
    assert body["data"] == [
        {
            "object": "score",
            "index": 0,
            "logprob": -9999.5,
            "is_greedy": False,
            "num_tokens": 2,
            "token_logprobs": [-0.5, -9999.0],
        }
    ]
    assert body["usage"]["total_tokens"] == 4


SCORED = {"prompt": "Hi", "max_tokens": 0, "echo": True}


def test_max_tokens_0_with_echo_scores_the_prompt() -> None:
    request = prepare(COMPLETIONS, **SCORED, logprobs=2)
    assert (request.task, request.score_start) == (Task.SCORE, 1)
    assert request.params.prompt_logprobs == 2
    for alias in ("max_completion_tokens", "max_new_tokens"):
        assert parse(COMPLETIONS, prompt="Hi", echo=True, **{alias: 0}).task is Task.SCORE
    for wrong in (
        {"max_tokens": 0},
        {"max_tokens": 0, "echo": True, "n": 2},
        {"max_tokens": 0, "max_new_tokens": 5, "echo": True},
        {"max_tokens": False, "echo": True},
        {"max_tokens": 0, "min_tokens": 2, "echo": True},
    ):
        with pytest.raises(RequestError):
            parse(COMPLETIONS, prompt="Hi", **wrong)


def test_the_body_of_a_scored_prompt() -> None:
    entries = [
        None,
        TokenLogprob(ord("H"), -1.0, 1, ((ord("H"), -1.0),)),
        TokenLogprob(ord("i"), -2.0, 5, ((ord("o"), -0.5),)),
    ]
    score = Score(token_logprobs=np.array([-1.0, -2.0], np.float32), is_greedy=False)
    given = {**SCORED, "logprobs": 1}
    body = answered(COMPLETIONS, given, score=score, prompt_logprobs=entries)
    assert body["object"] == "text_completion"
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "H", "i"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert choice["logprobs"]["top_logprobs"] == [None, {"H": -1.0}, {"o": -0.5, "i": -2.0}]
    assert body["usage"]["completion_tokens"] == 0
    body = answered(COMPLETIONS, SCORED, score=score)
    assert body["choices"][0]["logprobs"] is None


HERMES = Markup(reasons=True, tool_calls="hermes", visible_token_ids=frozenset({99}))
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


def test_chat_requests_carry_the_markup_of_the_model() -> None:
    assert prepare(CHAT, markup=HERMES, messages=USER).markup == HERMES
    assert prepare(COMPLETIONS, markup=HERMES, prompt="Hi").markup == Markup()


def test_tool_calls_and_reasoning_in_a_chat_body() -> None:
    given = {"messages": USER, "tools": TOOLS}
    outputs = said(f"<think>\nhm\n</think>\n\n{CALL}\n{CALL}")
    (choice,) = answered(CHAT, given, markup=HERMES, outputs=outputs)["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == (None, "hm")
    function = {"name": "f", "arguments": '{"x": 1}'}
    assert [call["function"] for call in message["tool_calls"]] == [function, function]
    assert {call["type"] for call in message["tool_calls"]} == {"function"}
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_a_tool_call_needs_tools_and_a_choice() -> None:
    for given in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        body = answered(CHAT, {"messages": USER, **given}, markup=HERMES, outputs=said(CALL))
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": CALL}
        assert choice["finish_reason"] == "stop"


def test_text_of_a_model_without_marks_is_not_split() -> None:
    text = f"<think>hm</think>{CALL}"
    body = answered(CHAT, {"messages": USER, "tools": TOOLS}, outputs=said(text))
    assert body["choices"][0]["message"] == {"role": "assistant", "content": text}


def test_what_the_output_limit_cut_says_length() -> None:
    given = {"messages": USER, "tools": TOOLS}
    cut = said(f"{CALL}<tool_call>", FinishReason.LENGTH)
    (choice,) = answered(CHAT, given, markup=HERMES, outputs=cut)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == "<tool_call>"
    assert len(choice["message"]["tool_calls"]) == 1
    cut = said("<think>hm", FinishReason.LENGTH)
    (choice,) = answered(CHAT, given, markup=HERMES, outputs=cut)["choices"]
    assert choice["message"] == {"role": "assistant", "content": None, "reasoning_content": "hm"}


def test_reasoning_that_the_template_opened() -> None:
    assert answered(
        CHAT,
        {
            "messages": [*USER, {"role": "assistant", "content": "<think>"}],
            "add_generation_prompt": False,
        },
        markup=HERMES,
        outputs=said("hm</think>Hi"),
    )["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hi",
        "reasoning_content": "hm",
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
names = st.sampled_from(
    "input context continuation encoding_format pooling normalize dimensions add_special_tokens "
    "parse_special model text_1 stream user prompt echo logprobs max_tokens max_new_tokens "
    "n".split()
)


@given_any(
    st.sampled_from([EMBEDDINGS, SCORE, SCORE_ALIAS, COMPLETIONS]),
    st.dictionaries(names | st.text(max_size=4), json_values | st.just(0) | st.just(True)),
)
def test_any_body_is_a_row_or_a_request_error(endpoint: str, body: dict[str, Any]) -> None:
    try:
        row = parse_row(InputRow(1, "r", endpoint, body))
    except RequestError as error:
        refused = error
    else:
        assert (row.prompt is None) != (row.prompt_token_ids is None)
        assert endpoint == COMPLETIONS or row.task is not Task.GENERATE
        return
    assert refused.line == 1
    assert refused.param is not None
    assert len(refused.message) < 400
