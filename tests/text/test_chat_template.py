"""Chat templates, rendered byte for byte as transformers renders them."""

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from batchwright.errors import RequestError
from batchwright.text import chat_template as module
from batchwright.text.chat_template import (
    MAX_TEMPLATE_BYTES,
    choose_chat_template,
    compile_chat_template,
)
from batchwright.text.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
NOW = datetime(2024, 7, 26, 12, 30)

CHATML = """\
{%- for message in messages -%}
    {%- if loop.first and message.role != "system" -%}
        {{ "<|im_start|>system\\nBe brief.<|im_end|>\\n" }}
    {%- endif -%}
    {{ "<|im_start|>" + message["role"] + "\\n" + message["content"] | trim + "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}
"""

LLAMA_LIKE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 2000" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\nToday: " + date_string + "\\n" + system }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
{%- endif %}
{{- "<|eot|>" }}
{% for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ "}" }}
    {%- elif message.content is string %}
        {{- "<|head|>" + message["role"] + "<|/head|>\\n\\n" + message["content"] | trim }}
    {%- else %}
        {%- for part in message.content %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {{- "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|head|>assistant<|/head|>\\n\\n" }}
{%- endif %}
"""

MISTRAL_LIKE = """\
{%- set ns = namespace(turns=0) %}
{{ bos_token }}{% for message in messages %}
    {%- if (message["role"] == "user") != (ns.turns % 2 == 0) %}
        {{- raise_exception("roles must alternate, found " ~ message["role"]) }}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if message["role"] == "user" %}
        {{- "[INST] " + message["content"] + " [/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("only user and assistant") }}
    {%- endif %}
{%- endfor %}
"""

QWEN_LIKE = """\
{%- if tools %}
    {{- "<|im_start|>system\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{ tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string
        and not message.content.startswith("<tool_response>") %}
        {%- set ns.multi = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- "<|im_start|>user" }}
        {%- endif %}
        {{- "\\n<tool_response>\\n" + message.content + "\\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- "<|im_end|>\\n" }}
        {%- endif %}
        {%- continue %}
    {%- endif %}
    {{- "<|im_start|>" + message.role }}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
        {{- "\\n<think>\\n" + message.reasoning_content.strip("\\n") + "\\n</think>\\n" }}
    {%- endif %}
    {%- if message.content %}{{- "\\n" + message.content }}{% endif %}
    {%- for call in message.tool_calls or [] %}
        {%- if call.function %}{% set call = call.function %}{% endif %}
        {{- '\\n<tool_call>\\n{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}
        {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {{- "}\\n</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}
"""

GEMMA_LIKE = """\
{{ bos_token }}{% if messages[0]["role"] == "system" %}
{{ raise_exception("no system role") }}
{% endif %}
{% for message in messages %}
{% set role = "model" if message["role"] == "assistant" else message["role"] %}
{{ "<start_of_turn>" + role + "\n" + message["content"] | trim + "<end_of_turn>\n" }}
{% endfor %}
{% if add_generation_prompt %}{{ "<start_of_turn>model\n" }}{% endif %}
"""

GENERATION = """\
{% for message in messages %}
    {% if message.role == "assistant" %}
        {% generation %}
        {% set mark = "inner" %}
        {{ message.content }}{{ eos_token }}
        {% endgeneration %}
        {{ mark is defined }}
    {% else %}
        {{ message.content }}
        {% if loop.index > 3 %}{% break %}{% endif %}
    {% endif %}
{% endfor %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA_LIKE,
    "mistral": MISTRAL_LIKE,
    "qwen": QWEN_LIKE,
    "gemma": GEMMA_LIKE,
    "generation": GENERATION,
}

USER = {"role": "user", "content": 'What\'s 2 < 3 & "so"?\n  '}
ASSISTANT = {"role": "assistant", "content": " Yes – ja 是 😀\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "turns": [USER, ASSISTANT, {"role": "user", "content": "Why?"}],
    "system": [{"role": "system", "content": " Sys\ttem "}, USER],
    "none values": [USER, {**ASSISTANT, "tool_calls": None, "name": None}],
    "reasoning": [USER, {**ASSISTANT, "reasoning": "\nhm\n"}],
    "thinking": [USER, {**ASSISTANT, "thinking": "t", "reasoning_content": "r"}],
    "tools": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"a": [1, "é<>'"]}}}
            ],
        },
        {"role": "tool", "content": '{"r": 1.5}'},
        {"role": "tool", "content": "2"},
    ],
    "empty": [{"role": "user", "content": ""}],
    "odd role": [{"role": "critic", "content": "hm"}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "<b>ünï</b> & 'quotes'",
            "parameters": {"type": "object", "properties": {"a": {"type": "array"}}},
        },
    }
]


@pytest.fixture(scope="module")
def reference() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()), **SPECIAL)


def ours(source: str, messages: list[dict[str, Any]], **options: Any) -> str | type[RequestError]:
    try:
        return compile_chat_template(source).render(
            messages, special_tokens=SPECIAL, now=NOW, **options
        )
    except RequestError:
        return RequestError


def theirs(reference: Any, source: str, messages: Any, **options: Any) -> str | type[RequestError]:
    from jinja2 import TemplateError

    try:
        return reference.apply_chat_template(
            messages, chat_template=source, tokenize=False, **options
        )
    except (TemplateError, TypeError, ValueError):
        return RequestError


@pytest.mark.cpu
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no-tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_equals_transformers(
    name: str,
    conversation: str,
    tools: Any,
    reference: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers.utils.chat_template_utils as utils

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return NOW

    monkeypatch.setattr(utils, "datetime", Frozen)
    source, messages = TEMPLATES[name], CONVERSATIONS[conversation]
    for prompt in (True, False):
        expected = theirs(reference, source, messages, tools=tools, add_generation_prompt=prompt)
        assert ours(source, messages, tools=tools, add_generation_prompt=prompt) == expected
    expected = theirs(reference, source, messages, tools=tools, continue_final_message=True)
    assert ours(source, messages, tools=tools, continue_final_message=True) == expected


@pytest.mark.cpu
def test_most_cases_render(reference: Any) -> None:
    # Guards the test above: cases where both sides refuse must be the few that should.
    refused = {
        (name, key)
        for name, source in TEMPLATES.items()
        for key, messages in CONVERSATIONS.items()
        if ours(source, messages) is RequestError
    }
    assert refused == {
        *(("mistral", key) for key in ("system", "tools", "odd role")),
        ("gemma", "system"),
    }


@pytest.mark.cpu
def test_smollm_template_equals_transformers(smollm: Tokenizer, smollm_reference: Any) -> None:
    conversations = [*CONVERSATIONS.values(), [USER, ASSISTANT] * 20]
    for messages in conversations:
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt}
            text = smollm_reference.apply_chat_template(messages, tokenize=False, **options)
            ids = smollm_reference.apply_chat_template(messages, return_dict=False, **options)
            if any(char.isdigit() for char in text):
                ids = smollm.encode(text, parse_special=True)  # see test_gguf_tokenizer
            assert smollm.encode_chat(messages, **options) == (text, ids)


@pytest.mark.cpu
@settings(max_examples=100)
@given(content=st.text(max_size=40), role=st.sampled_from(["user", "system", "assistant"]))
def test_any_content_equals_transformers(content: str, role: str, reference: Any) -> None:
    messages = [{"role": role, "content": content}, USER]
    assert ours(CHATML, messages) == theirs(reference, CHATML, messages, add_generation_prompt=True)


def test_strftime_now_is_frozen() -> None:
    source = "{{ strftime_now('%Y-%m-%d') }}"
    assert ours(source, [USER]) == "2024-07-26"


@pytest.mark.cpu
@pytest.mark.parametrize(
    "expression",
    [
        "x|tojson",
        "x|tojson(indent=2)",
        "x|tojson(ensure_ascii=True)",
        "x|tojson(separators=(',', ':'), sort_keys=True)",
        "x.items()|list",
        "x|dictsort",
        "dict(a=1, b=x.b)",
        "namespace(a=2).a",
        "dict.fromkeys(['a', 'b'], 3)",
        "missing is defined",
        "'%s-%d' % ('a', 3)",
        "x.a.upper() ~ [1, 2, 3][::-1]",
    ],
)
def test_filters_and_globals_equal_transformers(expression: str, reference: Any) -> None:
    source = f"{{% set x = {{'b': [1, 'é<'], 'a': 'z'}} %}}{{{{ {expression} }}}}"
    text = ours(source, [USER])
    assert isinstance(text, str) and text == theirs(reference, source, [USER])


@pytest.mark.parametrize(
    "expression",
    [
        "messages.append(1)",
        "messages[0].__class__.__mro__",
        "''.__class__",
        "namespace(__class__=1)",
        "raise_exception.__globals__",
        "strftime_now.__globals__",
        "dict.__init__",
        "range(1000000)|list",
        "cycler.__init__.__globals__",
    ],
)
def test_sandbox_holds(expression: str) -> None:
    # Refused, or undefined, which renders as nothing.
    assert ours("{{ " + expression + " }}", [USER]) in (RequestError, "")


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ raise_exception('no ' + 'way') }}", "no way"),
        ("{{ messages[7].role.x }}", "has no element 7|no attribute"),
        ("{{ 'a' + 1 }}", "str"),
        ("{{ 1 / 0 }}", "zero"),
        ("{{ [].pop() }}", "pop"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 1e999 if messages else 1 }}", "inf"),
        ("{{ cycler() }}", "at least one item"),
        ("{{ 1" + 5000 * "0" + " }}", "4300 digits"),
    ],
)
def test_template_failures_are_row_errors(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        compile_chat_template(source).render([USER], now=NOW)


@pytest.mark.parametrize("source", ["{% for %}", "{{ a", "{% generation %}", "{% include 'x' %}"])
def test_bad_templates_are_row_errors(source: str) -> None:
    with pytest.raises(RequestError, match="template"):
        compile_chat_template(source).render([USER], now=NOW)


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_chat_template("x" * MAX_TEMPLATE_BYTES)
    with pytest.raises(RequestError, match="limit is 1048576"):
        compile_chat_template("x" * (MAX_TEMPLATE_BYTES + 1))
    monkeypatch.setattr(module, "MAX_RENDERED_CHARS", 100)
    loop = "{% for i in range(9) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(RequestError, match="more than 100 characters"):
        compile_chat_template(loop).render([{"role": "user", "content": "x" * 20}], now=NOW)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "empty"),
        ("hello", "str, must be a list"),
        ({"role": "user"}, "dict, must be a list"),
        (["hello"], r"messages\[0\] is str"),
        ([{"content": "x"}], r'messages\[0\] has no "role"'),
        ([USER, {"role": 3, "content": "x"}], r'messages\[1\] has no "role"'),
        ([{"role": "user", "content": 5}], "content is int"),
        ([{"role": "user", "content": {"text": "x"}}], "content is dict"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], "only"),
        ([{"role": "user", "content": ["x"]}], "only"),
        ([{"role": "user", "content": "x", "extra": object()}], "object"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], "key 1"),
    ],
)
def test_bad_messages_are_row_errors(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        compile_chat_template(CHATML).render(messages, now=NOW)
    assert caught.value.param == "messages"


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(RequestError, match="deep"):
        compile_chat_template(CHATML).render(
            [{"role": "user", "content": "x", "extra": deep}], now=NOW
        )


@pytest.mark.parametrize("tools", ["x", {"a": 1}, ["x"], [{"a": object()}]])
def test_bad_tools_are_row_errors(tools: Any) -> None:
    with pytest.raises(RequestError, match="tools") as caught:
        compile_chat_template(QWEN_LIKE).render([USER], tools=tools, now=NOW)
    assert caught.value.param == "tools"


def test_text_parts_are_joined_unless_the_template_takes_them() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    in_parts, joined = ([{"role": "user", "content": content}] for content in (parts, "a b"))
    assert not compile_chat_template(CHATML).accepts_parts
    assert compile_chat_template(LLAMA_LIKE).accepts_parts
    assert ours(CHATML, in_parts) == ours(CHATML, joined)
    assert ours(LLAMA_LIKE, in_parts) == "".join(
        [ours(LLAMA_LIKE, joined).replace("<|head|>user<|/head|>\n\n", "")]  # type: ignore
    )


@pytest.mark.cpu
def test_parts_equal_transformers_where_the_template_takes_them(reference: Any) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    source = LLAMA_LIKE.replace("strftime_now is defined", "false")
    assert ours(source, messages, add_generation_prompt=False) == theirs(
        reference, source, messages
    )
    options = {"continue_final_message": True}
    assert ours(source, messages, **options) == theirs(reference, source, messages, **options)


def test_kwargs_must_be_read_by_the_template() -> None:
    template = compile_chat_template(QWEN_LIKE)
    text = template.render([USER], now=NOW, template_kwargs={"enable_thinking": False})
    assert text.endswith("<think>\n\n</think>\n\n")
    for name in ("unheard_of", "messages", "tools", "raise_exception", "namespace"):
        with pytest.raises(RequestError, match=f"{name}.*enable_thinking") as caught:
            template.render([USER], now=NOW, template_kwargs={name: 1})
        assert caught.value.param == "chat_template_kwargs"
    llama = compile_chat_template(LLAMA_LIKE)
    text = llama.render(
        [USER], now=NOW, special_tokens=SPECIAL, template_kwargs={"date_string": "today"}
    )
    assert "Today: today" in text
    with pytest.raises(RequestError, match="bos_token"):
        llama.render([USER], now=NOW, special_tokens=SPECIAL, template_kwargs={"bos_token": "x"})


def test_choice_of_template() -> None:
    both = {"default": "D", "tool_use": "T"}
    assert choose_chat_template("S", with_tools=True).source == "S"
    assert choose_chat_template(both, with_tools=False).source == "D"
    assert choose_chat_template(both, with_tools=True).source == "T"
    assert choose_chat_template({"default": "D"}, with_tools=True).source == "D"
    with pytest.raises(RequestError, match="no default"):
        choose_chat_template({"rag": "R"}, with_tools=False)
    with pytest.raises(RequestError, match='use "prompt"'):
        choose_chat_template(None, with_tools=False)


def test_compiled_once() -> None:
    assert compile_chat_template(CHATML) is compile_chat_template(
        str(json.loads(json.dumps(CHATML)))
    )


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    before = json.dumps(messages)
    ours(LLAMA_LIKE, messages, continue_final_message=True)
    assert json.dumps(messages) == before
