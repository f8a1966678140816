"""Response bodies in OpenAI's form."""

import math

import msgspec

from batchwright.job.answer import AnswerForm
from batchwright.job.formats.logprobs import token_text
from batchwright.job.formats.response_body import response_body
from batchwright.job.rows import CHAT, COMPLETIONS
from batchwright.request import Completion, FinishReason, Result, TokenLogprob
from tests.job.fakes import token_bytes


def result(**changes: object) -> Result:
    given = {
        "request_id": "r1",
        "prompt_token_ids": list(b"Hi"),
        "prompt": "Hi",
        "num_cached_tokens": 1,
        "outputs": [
            Completion(
                index=0,
                text="é!",
                token_ids=[0xC3, 0xA9, ord("!")],
                finish_reason=FinishReason.STOP,
                stop_reason="\n",
                logprobs=[
                    TokenLogprob(0xC3, -0.25, 1, ((0xC3, -0.25), (65, -2.0))),
                    TokenLogprob(0xA9, -0.5, 2, ((66, -0.1), (0xA9, -0.5))),
                    TokenLogprob(ord("!"), -math.inf, 3, ((66, -0.1), (67, -0.2))),
                ],
            )
        ],
    }
    return Result(**(given | changes))  # type: ignore[arg-type]


def body(form: AnswerForm, **changes: object) -> dict:
    made = response_body(result(**changes), form, token_bytes, model="m", created=5)
    return msgspec.json.decode(msgspec.json.encode(made))


def test_chat_body() -> None:
    made = body(AnswerForm(CHAT))
    assert made["object"] == "chat.completion"
    assert made["id"].startswith("chatcmpl-")
    assert (made["model"], made["created"]) == ("m", 5)
    assert made["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    (choice,) = made["choices"]
    assert choice["message"] == {"role": "assistant", "content": "é!"}
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "\n")
    content = choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [0x21]]
    assert [entry["token"] for entry in content] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert content[0]["top_logprobs"][1] == {"token": "A", "logprob": -2.0, "bytes": [65]}
    assert content[2]["logprob"] == -9999.0  # never null, never -Infinity


def test_no_logprobs_unless_asked() -> None:
    plain = Completion(index=0, text="a", token_ids=[97], finish_reason=FinishReason.LENGTH)
    assert body(AnswerForm(CHAT), outputs=[plain])["choices"][0]["logprobs"] is None
    assert body(AnswerForm(COMPLETIONS), outputs=[plain])["choices"][0]["logprobs"] is None


def test_text_body() -> None:
    made = body(AnswerForm(COMPLETIONS))
    assert made["object"] == "text_completion"
    assert made["choices"][0]["text"] == "é!"
    logprobs = made["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["token_logprobs"] == [-0.25, -0.5, -9999.0]
    assert logprobs["text_offset"] == [0, 1, 1]
    assert logprobs["top_logprobs"][2] == {"B": -0.1, "C": -0.2, "!": -9999.0}


def test_echo_puts_the_prompt_first_and_joins_the_logprobs() -> None:
    prompt_logprobs = [None, TokenLogprob(-1, -3.0, 7, ((65, -1.0),))]
    made = body(AnswerForm(COMPLETIONS, echo=True), prompt_logprobs=prompt_logprobs)
    assert made["choices"][0]["text"] == "Hié!"
    assert "prompt_logprobs" not in made["choices"][0]
    logprobs = made["choices"][0]["logprobs"]
    assert logprobs["tokens"][:3] == ["H", "i", "bytes:\\xc3"]
    assert logprobs["token_logprobs"][:3] == [None, -3.0, -0.25]
    assert logprobs["top_logprobs"][:2] == [None, {"A": -1.0, "i": -3.0}]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 3]


def test_echo_of_token_ids_without_text() -> None:
    assert body(AnswerForm(COMPLETIONS, echo=True), prompt=None)["choices"][0]["text"] == "Hié!"


def test_prompt_logprobs_have_the_form_of_vllm() -> None:
    entries = [None, TokenLogprob(ord("i"), -3.0, 7, ((65, -1.0),))]
    expected = [
        None,
        {
            "65": {"logprob": -1.0, "rank": 1, "decoded_token": "A"},
            "105": {"logprob": -3.0, "rank": 7, "decoded_token": "i"},
        },
    ]
    chat = body(AnswerForm(CHAT, prompt_logprobs=True), prompt_logprobs=entries)
    assert chat["prompt_logprobs"] == expected
    text = body(AnswerForm(COMPLETIONS, prompt_logprobs=True), prompt_logprobs=entries)
    assert text["choices"][0]["prompt_logprobs"] == expected


def test_bodies_are_a_function_of_the_result() -> None:
    assert body(AnswerForm(CHAT)) == body(AnswerForm(CHAT))
    assert body(AnswerForm(CHAT))["id"] != body(AnswerForm(CHAT), request_id="r2")["id"]


def test_token_text_keeps_whole_characters() -> None:
    assert token_text("né".encode()) == "né"
    assert token_text(b"\xe2\x80") == "bytes:\\xe2\\x80"
