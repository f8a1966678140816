"""LLM on the real model: scores and embeddings against transformers with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from batchwright.errors import ConfigError, RequestError
from batchwright.llm import LLM
from batchwright.request import Result, SamplingParams
from tests.engine.smollm2 import reference_model

pytestmark = pytest.mark.cpu

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Paris, a city on the river Seine."),
    ("The capital of France is", " London"),
    ("The capital of France is", "Paris"),
    ("The capital of France is ", "Paris"),
    ("Once upon a time", ", there was a little girl who lived in a village."),
    ("Once upon a time", " qwxz"),
    ("Question: What is 2 + 2?\nAnswer:", " 4"),
    ("Question: What is 2 + 2?\nAnswer:", " 5"),
    ("Question: What is 2 + 2?\nAnswer: ", "4"),
    ("Question: What is 2 + 2?\nAnswer:\n", "4"),
    ("def add(a, b):\n", "    return a + b\n"),
    ("def add(a, b):\n    ", "return a + b\n"),
    ("one two three four five six", " seven eight nine ten"),
    ("A B C D E F", " G"),
    ("A B C D E F", " G H I J K L"),
    ("naïve café", " über-cool 日本語 🙂"),
    ("日本の首都は", "東京です。"),
    ("1, 2, 3, 4, 5,", " 6, 7, 8, 9, 10"),
    ("Roses are red,\nviolets are", " blue"),
    ("Roses are red,\nviolets are", " orange"),
    ("The informat", "ive lecture was long"),
    ("x", " y"),
    ("\t tabs and spaces \t ", "here"),
    ("<|im_start|>user", "\nHello<|im_end|>"),
    ("The committee met on Tuesday to discuss the new budget. " * 12, "It was a long meeting."),
    ("The committee met on Tuesday to discuss the new budget. " * 12, "It was cold."),
    ("", "The sky is blue."),
    ("   ", "The sky is blue."),
    ("", "a"),
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", max_num_batched_tokens=256)


@pytest.fixture(scope="module")
def scores(llm: LLM) -> list[Result]:
    return llm.score(PAIRS)


def reference_tokens(llm: LLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The pair as lm-evaluation-harness encodes it."""
    encode = llm.tokenizer.encode
    num_spaces = len(context) - len(context.rstrip())
    if num_spaces:
        context, continuation = context[:-num_spaces], context[-num_spaces:] + continuation
    if not context:
        return [llm.tokenizer.bos_token_id], encode(continuation)
    before = encode(context)
    return before, encode(context + continuation)[len(before) :]


def reference_score(before: list[int], after: list[int]) -> tuple[float, bool, float]:
    """(log-likelihood, is greedy, smallest top-2 margin) by transformers, alone in its batch."""
    with torch.inference_mode():
        logits = reference_model()(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    targets = torch.tensor(after)
    logprobs = logits.double().log_softmax(-1)[torch.arange(len(after)), targets]
    best = logits.topk(2).values
    is_greedy = bool((logits.argmax(-1) == targets).all())
    return float(logprobs.sum()), is_greedy, float((best[:, 0] - best[:, 1]).min())


def test_scores_equal_transformers(llm: LLM, scores: list[Result]) -> None:
    largest, num_greedy = 0.0, 0
    for (context, continuation), result in zip(PAIRS, scores, strict=True):
        before, after = reference_tokens(llm, context, continuation)
        expected, is_greedy, margin = reference_score(before, after)
        assert result.error is None
        assert result.prompt_token_ids == before + after
        assert len(result.score.token_logprobs) == len(after)
        assert result.score.is_greedy == is_greedy or margin < 1e-3
        largest = max(largest, abs(result.score.logprob - expected))
        num_greedy += is_greedy
    assert largest < 1e-3, f"{largest} nats"
    assert 0 < num_greedy < len(PAIRS)
    print(f"{len(PAIRS)} pairs, largest difference {largest:.1e} nats, {num_greedy} greedy")


def test_white_space_moves_to_the_continuation(llm: LLM, scores: list[Result]) -> None:
    def score(context: str, continuation: str) -> Result:
        return scores[PAIRS.index((context, continuation))]

    moved = score("The capital of France is ", "Paris")
    assert moved.prompt_token_ids == score("The capital of France is", " Paris").prompt_token_ids
    assert moved.score.logprob == score("The capital of France is", " Paris").score.logprob
    # Left where it was, the space would be a token of its own and another score.
    assert abs(moved.score.logprob - score("The capital of France is", "Paris").score.logprob) > 1


def test_empty_context_is_the_begin_token(llm: LLM, scores: list[Result]) -> None:
    result = scores[PAIRS.index(("", "The sky is blue."))]
    assert result.prompt_token_ids[0] == llm.prefix_token_id == llm.tokenizer.bos_token_id
    # Token ids may be given instead of texts; an empty list is an empty context too.
    ids = llm.tokenizer.encode("The sky is blue.")
    assert [r.score.logprob for r in llm.score([([], ids), ("", ids)])] == 2 * [
        result.score.logprob
    ]


def test_nothing_to_score_is_an_error_of_that_row(llm: LLM) -> None:
    # " information" is one token, " informat" is two: none is left for the continuation.
    merged = (" informat", "ion")
    assert len(llm.tokenizer.encode("".join(merged))) < len(llm.tokenizer.encode(merged[0]))
    empty, swallowed, fine = llm.score([("The sky is", ""), merged, ("The sky is", " blue")])
    assert "no token to score" in str(empty.error)
    assert "no token to score" in str(swallowed.error)
    assert fine.error is None and fine.score.logprob < 0


TEXTS = ["A short text.", "x", "The committee met on Tuesday to discuss the new budget. " * 30]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_equal_transformers(llm: LLM, pooling: str) -> None:
    results = llm.embed(TEXTS, pooling=pooling)
    embeddings = [result.embedding for result in results]
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        expected = reference_embedding(llm, text, pooling)
        assert relative_error(embedding, expected) < 1e-3
    other = reference_embedding(llm, TEXTS[0], "last" if pooling == "mean" else "mean")
    assert relative_error(embeddings[0], other) > 0.1  # the two poolings are far apart


def reference_embedding(llm: LLM, text: str, pooling: str) -> np.ndarray:
    token_ids = torch.tensor([llm.tokenizer.encode(text)])
    with torch.inference_mode():
        hidden = reference_model().model(token_ids).last_hidden_state[0]
    return (hidden.double().mean(0) if pooling == "mean" else hidden[-1]).float().numpy()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def short(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def test_a_row_that_cannot_be_encoded_fails_alone(llm: LLM) -> None:
    first, bad, last = llm.generate(["The capital of France is", "\ud800", "A"], short(2))
    assert "lone surrogate" in str(bad.error)
    assert first.outputs[0].text == " Paris." and last.error is None
    fine, bad = llm.chat(
        [[{"role": "user", "content": text}] for text in ("Hi", "\ud800")], short(2)
    )
    assert fine.error is None and "half a surrogate pair" in str(bad.error)
    bad, fine = llm.score([("\ud800", " a"), ("The sky is", " blue")])
    assert fine.error is None and "lone surrogate" in str(bad.error)
    bad, fine = llm.embed(["\ud800", "a"])
    assert fine.error is None and "lone surrogate" in str(bad.error)


def test_token_ids_may_be_an_array(llm: LLM) -> None:
    ids = llm.tokenizer.encode("The capital of France is")
    texts = [
        llm.generate(prompt, short(2))[0].outputs[0].text
        for prompt in (ids, np.array(ids), [np.array(ids, np.int32)])
    ]
    assert texts == 3 * [" Paris."]


def test_an_abandoned_stream_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream(["A", "Once upon a time"], [short(1), short(30)])
    assert next(stream).request_id == "0"
    stream.close()
    (result,) = llm.generate(["The capital of France is"], short(2))
    assert result.outputs[0].text == " Paris."
    llm.engine.check_integrity()


def test_two_streams_at_once_are_refused(llm: LLM) -> None:
    """Both would name their rows 0, 1, ..., and one would be given the other's."""
    stream = llm.stream(["A", "Once upon a time"], [short(1), short(3)])
    next(stream)
    with pytest.raises(ConfigError, match="still running"):
        llm.generate(["The capital of France is"], short(2))
    assert [result.request_id for result in stream] == ["1"]
    assert llm.generate(["The capital of France is"], short(2))[0].outputs[0].text == " Paris."


def test_one_bad_set_of_parameters_fails_alone(llm: LLM) -> None:
    fine, bad, odd = llm.generate(["A", "B", "C"], [short(1), SamplingParams(top_p=2.0), "fast"])
    assert fine.error is None
    assert "top_p is 2.0" in str(bad.error)
    assert "must be SamplingParams, not 'fast'" in str(odd.error)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate(["A"], "fast"), "params must be SamplingParams or a list"),
        (lambda llm: llm.generate(["A"], [short(1)] * 2), "2 sampling params for 1 prompts"),
        (lambda llm: llm.generate(None), "rows are a list of texts or lists of token ids"),
        (lambda llm: llm.generate({"prompt": "x"}), "rows are a list of texts .* not dict"),
        (lambda llm: llm.generate(b"abc"), "rows are a list of texts .* not bytes"),
        (lambda llm: llm.embed({"a", "b"}), "rows are a list of texts .* not set"),
        (lambda llm: llm.score(5), "rows are a list of .context, continuation. pairs, not int"),
        (lambda llm: llm.chat("hi"), "chat takes a list of messages"),
        (lambda llm: llm.chat({"role": "user", "content": "hi"}), "chat takes a list of messages"),
    ],
)
def test_a_call_that_makes_no_sense_says_so(llm: LLM, call, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call(llm)


def test_what_all_chats_share_is_checked_first(llm: LLM) -> None:
    chat = [{"role": "user", "content": "hi"}]
    with pytest.raises(RequestError, match=r"tools.0. must be"):
        llm.chat(chat, tools=[{"a": 1}])
    with pytest.raises(RequestError, match="chat_template_kwargs must be an object"):
        llm.chat(chat, chat_template_kwargs="thinking")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_model_len": "4k"},
        {"max_num_seqs": None},
        {"num_threads": 1.5},
        {"seed": -1},
        {"seed": None},
        {"look_ahead": True},
        {"prefix_sharing": "no"},
    ],
)
def test_settings_of_the_wrong_kind(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LLM("no-such-model", **settings)


def test_a_row_of_the_wrong_shape_says_so(llm: LLM) -> None:
    (result,) = llm.generate([[True, False]])
    assert "a prompt is a text or a list of token ids" in str(result.error)
    for result in llm.score(("a", "b")):
        assert "must be (context, continuation)" in str(result.error)
    (result,) = llm.chat([["hi"]])
    assert "messages[0] must be an object" in str(result.error)
    (result,) = llm.chat([[{"role": "user"}]])
    assert "messages[0].content is missing" in str(result.error)
