"""Bodies to ParsedRows: what is accepted, what is refused and how that reads."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.errors import RequestError
from batchwright.job.names import _ONLY, _ONLY_CHAT, _ONLY_COMPLETIONS
from batchwright.job.rows import CHAT, COMPLETIONS, InputRow, endpoint_of_bare_row
from batchwright.job.validate import ParsedRow, parse_row
from batchwright.repetition import RepetitionDetection
from batchwright.request import SamplingParams
from batchwright.validation.params import PARAM_NAMES, check_params, validate_params

USER = [{"role": "user", "content": "Hi"}]


def chat(**body: Any) -> ParsedRow:
    return parse_row(InputRow(3, "r", CHAT, {"messages": USER, **body}))


def completion(**body: Any) -> ParsedRow:
    return parse_row(InputRow(3, "r", COMPLETIONS, {"prompt": "Hi", **body}))


def test_everything_at_once() -> None:
    row = chat(
        model="m",
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        max_completion_tokens=7,
        min_tokens=2,
        stop="END",
        include_stop_str_in_output=True,
        stop_token_ids=[5],
        ignore_eos=True,
        repetition_detection={"max_pattern_size": 4, "min_count": 3},
        seed=3,
        n=2,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"12": -100, "13": 2.5},
        logprobs=True,
        top_logprobs=4,
        prompt_logprobs=1,
        skip_special_tokens=False,
        chat_template_kwargs={"enable_thinking": False},
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="auto",
        verbosity="medium",
        parse_special=True,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        response_format={"type": "text"},
        stream=False,
    )
    assert row.params == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        min_p=0.1,
        max_tokens=7,
        min_tokens=2,
        stop=("END",),
        include_stop_str_in_output=True,
        stop_token_ids=(5,),
        ignore_eos=True,
        repetition_detection=RepetitionDetection(max_pattern_size=4, min_count=3),
        seed=3,
        n=2,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        logit_bias={12: -100.0, 13: 2.5},
        logprobs=4,
        prompt_logprobs=1,
        skip_special_tokens=False,
    )
    assert row.template_kwargs == {"enable_thinking": False}
    assert row.tools is not None
    assert row.parse_special
    assert row.report_prompt_logprobs
    assert (row.is_chat, row.model, row.line) == (True, "m", 3)


def test_null_means_the_default() -> None:
    body: dict[str, Any] = dict.fromkeys(PARAM_NAMES - {"logprobs"})
    assert chat(**body, tools=None).params == SamplingParams()


def test_defaults_are_those_of_the_api() -> None:
    params = chat().params
    assert params == SamplingParams()
    assert params.temperature == 1.0
    assert params.max_tokens is None


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"temperature": "hot"}, "temperature", "must be a number, not 'hot'"),
        ({"temperature": -0.1}, "temperature", "is -0.1; it must be between 0 and 100"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"temperature": 1e-30}, "temperature", "use 0 for greedy"),
        ({"temperature": 10**400}, "temperature", "between 0 and 100"),
        ({"top_p": 1.5}, "top_p", "between 0 and 1"),
        ({"top_k": -2}, "top_k", "between -1 and"),
        ({"top_k": 1.5}, "top_k", "whole number"),
        ({"min_p": 2}, "min_p", "between 0 and 1"),
        ({"max_tokens": -5}, "max_tokens", "is -5; it must be between 1 and"),
        ({"max_tokens": 0}, "max_tokens", "between 1"),
        ({"max_new_tokens": 0}, "max_new_tokens", "between 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "give one"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens is 9 and max_tokens 8"),
        ({"min_tokens": 5000}, "min_tokens", "max_tokens 1024"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": "x" * 1001}, "stop", "at most 1000"),
        ({"stop": [1]}, "stop", "must be a string"),
        ({"stop": {"a": 1}}, "stop", "must be a list"),
        ({"repetition_detection": True}, "repetition_detection", "must be an object"),
        (
            {"repetition_detection": {"max_pattern_size": 4}},
            "repetition_detection.min_count",
            "is 0; it must be between 2",
        ),
        (
            {
                "repetition_detection": {
                    "max_pattern_size": 4,
                    "min_pattern_size": 5,
                    "min_count": 2,
                }
            },
            "repetition_detection.min_pattern_size",
            "between 0 and 4",
        ),
        (
            {"repetition_detection": {"max_size": 4}},
            "repetition_detection.max_size",
            "did you mean 'repetition_detection.max_pattern_size'",
        ),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "has -1 at index 0"),
        ({"stop_token_ids": list(range(257))}, "stop_token_ids", "at most 256"),
        ({"seed": -(2**63) - 1}, "seed", "between -9223372036854775808"),
        ({"n": 0}, "n", "between 1 and 128"),
        ({"n": 129}, "n", "between 1 and 128"),
        ({"presence_penalty": 3}, "presence_penalty", "between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "between 0.01"),
        ({"logit_bias": [1]}, "logit_bias", "must be an object"),
        ({"logit_bias": {"a": 1}}, "logit_bias token id", "whole number, not 'a'"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias", "token id 1 twice"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"logprobs": 5}, "logprobs", "true or false"),
        ({"top_logprobs": 5}, "top_logprobs", "set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 101}, "top_logprobs", "between 0 and 100"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "between 0"),
        ({"stream": True}, "stream", "as rows finish"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object' or"),
        ({"guided_regex": ""}, "guided_regex", "at least 1"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "is empty"),
        ({"chat_template": 5}, "chat_template", "must be a string"),
        ({"echo": True}, "echo", "/v1/completions"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"zzzz": 1}, "zzzz", "remove it"),
        ({"zzzz": None}, "zzzz", "unknown parameter"),
        ({"prompt": "x"}, "prompt", "unknown parameter"),
        ({"model": 5}, "model", "must be a string"),
        ({"parse_special": "yes"}, "parse_special", "true or false"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "must be an object"),
        ({"tools": [{"type": "web"}]}, "tools[0]", '"function"'),
        ({"tool_choice": "required"}, "tool_choice", "give auto or none"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "remove it"),
        ({"verbosity": "low"}, "verbosity", "only medium"),
        ({"continue_final_message": True}, "continue_final_message", "the assistant's"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "exclude each other",
        ),
        ({"messages": None}, "messages", "is missing"),
        ({"messages": []}, "messages", "is empty"),
        ({"messages": "Hi"}, "messages", "must be a list"),
        ({"messages": ["Hi"]}, "messages[0]", "must be an object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "a list of text parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0]",
            "only text is supported",
        ),
    ],
)
def test_refused_in_chat(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**body)
    assert caught.value.param == param
    assert words in caught.value.message
    assert caught.value.line == 3


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"logprobs": True}, "logprobs", "whole number for completions"),
        ({"top_logprobs": 2}, "top_logprobs", "unknown parameter"),
        ({"messages": USER}, "messages", "unknown parameter"),
        ({"prompt": None}, "prompt", "is missing"),
        ({"prompt": 5}, "prompt", "must be a string"),
        ({"prompt": ["a", 5]}, "prompt[1]", "must be a string"),
        ({"prompt": [[1], [2, -1]]}, "prompt[1]", "-1 at index 1"),
        ({"prompt": ["a", []]}, "prompt[1]", "is empty"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": ["a"] * 2049}, "prompt", "at most 2048"),
        ({"prompt": [1, -1]}, "prompt", "-1 at index 1"),
        ({"prompt": [1, True]}, "prompt", "True at index 1"),
        ({"prompt": "x", "prompt_token_ids": [1]}, "prompt", "exclude each other"),
        ({"prompt": None, "prompt_token_ids": []}, "prompt_token_ids", "is missing"),
        ({"best_of": 3}, "best_of", "differs from n"),
        ({"suffix": "x"}, "suffix", "not supported"),
    ],
)
def test_refused_in_completions(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**body)
    if "is missing" not in words:
        assert caught.value.param == param
        assert words in caught.value.message


def test_prompts_of_completions() -> None:
    assert completion(prompt=["Hi"]).prompt == "Hi"
    assert completion(prompt=[1, 2]).prompt_token_ids == [1, 2]
    body = {"prompt_token_ids": [4, 5]}
    assert parse_row(InputRow(1, "r", COMPLETIONS, body)).prompt_token_ids == [4, 5]


def test_echo_with_logprobs_asks_for_those_of_the_prompt() -> None:
    row = completion(echo=True, logprobs=2)
    assert (row.params.logprobs, row.params.prompt_logprobs) == (2, 2)
    assert not row.report_prompt_logprobs
    assert completion(echo=True).params.prompt_logprobs is None


def test_logprobs_of_chat() -> None:
    assert chat().params.logprobs is None
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).params.logprobs == 3
    assert chat(logprobs=False, top_logprobs=0).params.logprobs is None


def test_text_parts_and_other_keys_pass_on() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = chat(messages=[{"role": "user", "content": parts, "name": "Ann"}])
    assert row.messages == [{"role": "user", "content": parts, "name": "Ann"}]


def test_tool_call_arguments_become_an_object() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = chat(messages=[*USER, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert row.messages is not None
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert call["function"]["arguments"] == '{"x": 1}'  # the input is not changed
    call["function"]["arguments"] = "{"
    with pytest.raises(RequestError, match=r"arguments is not valid JSON"):
        chat(messages=[{"role": "assistant", "tool_calls": [call]}])


def test_aliases_of_max_tokens() -> None:
    assert chat(max_new_tokens=5, max_tokens=5).params.max_tokens == 5
    assert completion(max_completion_tokens=6.0).params.max_tokens == 6


def test_top_p_zero_is_the_likeliest_token_alone() -> None:
    params = validate_params(top_p=0, top_k=40)
    assert (params.top_p, params.top_k) == (1.0, 1)


def test_python_callers_may_use_numpy_and_tuples() -> None:
    params = validate_params(
        temperature=np.float32(0.5), n=np.int64(2), stop=("a",), logit_bias={5: 1}, logprobs=3
    )
    assert params == SamplingParams(
        temperature=0.5, n=2, stop=("a",), logit_bias={5: 1.0}, logprobs=3
    )
    assert type(params.n) is int
    assert type(params.temperature) is float
    assert check_params(params) == params
    with pytest.raises(RequestError, match="between 1 and 128"):
        check_params(SamplingParams(n=0))
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        validate_params(temperatur=1)


def test_unsupported_parameters_say_what_to_do() -> None:
    for name in _ONLY | _ONLY_CHAT:
        with pytest.raises(RequestError) as caught:
            chat(**{name: "something"})
        assert caught.value.code == "unsupported_parameter"
    for name in _ONLY | _ONLY_COMPLETIONS:
        with pytest.raises(RequestError) as caught:
            completion(**{name: "something"})
        assert caught.value.code == "unsupported_parameter"


def test_messages_stay_short_whatever_the_value() -> None:
    for value in ("x" * 100_000, ["x"] * 100_000, 10**10_000, {"a": "x" * 100_000}):
        with pytest.raises(RequestError) as caught:
            chat(temperature=value)
        assert len(caught.value.message) < 200
    with pytest.raises(RequestError) as caught:
        chat(**{"x" * 100_000: 1})
    assert len(caught.value.message) < 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["role", "content"]), inner)
    ),
    max_leaves=6,
)
names = st.sampled_from(
    sorted(
        PARAM_NAMES
        | _ONLY.keys()
        | _ONLY_CHAT.keys()
        | {"messages", "prompt", "prompt_token_ids", "tools", "chat_template_kwargs", "model"}
        | {"top_logprobs", "continue_final_message", "max_new_tokens", "best_of", "suffix"}
    )
)


@given(
    st.sampled_from([CHAT, COMPLETIONS]), st.dictionaries(names | st.text(max_size=4), json_values)
)
def test_any_body_is_a_row_or_a_request_error(endpoint: str, body: dict[str, Any]) -> None:
    try:
        row = parse_row(InputRow(1, "r", endpoint, body))
    except RequestError as error:
        refused = error
    else:
        assert row.params == check_params(row.params)
        return
    assert refused.line == 1
    assert refused.param is not None
    assert len(refused.message) < 400
    msgspec.json.encode(refused.message)  # can be written to the error file


good_values: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0.01, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 1000),
    "min_p": st.floats(0, 1),
    "max_tokens": st.integers(1, 4096),
    "stop": st.text(min_size=1, max_size=4) | st.lists(st.text(min_size=1), max_size=16),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 128),
    "logit_bias": st.dictionaries(st.integers(0, 50_000).map(str), st.floats(-100, 100)),
    "presence_penalty": st.floats(-2, 2),
}


@given(st.fixed_dictionaries({}, optional=good_values))
def test_good_values_are_taken_as_given(body: dict[str, Any]) -> None:
    params = chat(**body).params
    for name, value in body.items():
        if name not in ("stop", "logit_bias", "top_k"):
            assert getattr(params, name) == value


@pytest.mark.parametrize(
    "body",
    [
        {"messages": "SECRET"},
        {"messages": ["SECRET"]},
        {"messages": [{"role": "user", "content": ["SECRET"]}]},
        {"prompt": ["SECRET", 5]},
        {"prompt": [5, "SECRET"]},
        {"prompt_token_ids": "SECRET"},
        {"prompt": "x", "suffix": "SECRET"},
        {"input": {"SECRET": 1}},
        {"context": "x", "continuation": ["SECRET"]},
    ],
)
def test_messages_hold_no_text_of_prompts(body: dict[str, Any]) -> None:
    row = InputRow(1, "a", endpoint_of_bare_row(body), body)
    with pytest.raises(RequestError) as caught:
        parse_row(row)
    assert "SECRET" not in caught.value.message
