"""From an input row's body to a ParsedRow: every parameter known, checked and bounded.

No tokenizer is needed here, so a file can be checked in seconds. What depends on the model (the
vocabulary, the context, the chat template) is checked in `prepare.py`.
"""

from __future__ import annotations

import marshal
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from batchwright.errors import RequestError
from batchwright.job.names import check_names
from batchwright.job.rows import CHAT, COMPLETIONS, EMBEDDINGS, SCORE, SCORE_ALIAS, InputRow
from batchwright.prompt_cache.call import PromptCall, parse_call
from batchwright.request import SamplingParams, Task
from batchwright.validation import checks
from batchwright.validation.messages import check_messages, check_template_kwargs, check_tools
from batchwright.validation.params import (
    MAX_LOGPROBS,
    MAX_TOKENS_ALIASES,
    PARAM_NAMES,
    validate_params,
)

MAX_PROMPT_TOKEN_IDS = 10_000_000
MAX_PROMPTS = 2048  # as the hosted API has it
MAX_TEMPLATE_CHARS = 262_144

Prompt = str | list[int]

_SAMPLING_NAMES = PARAM_NAMES | set(MAX_TOKENS_ALIASES)
_FORMATS = ("float", "base64")
_UNSAMPLED = SamplingParams(max_tokens=1)  # what rows that generate nothing carry


@dataclass(slots=True, kw_only=True)  # not frozen: that would take twice as long to make
class ParsedRow:
    """A row that is sound as far as can be told without the model.

    Exactly one of messages, prompt, prompt_token_ids and prompts is set.

    Attributes:
        line, custom_id, endpoint: as in InputRow.
        params: how to sample; of rows that generate nothing, what to report of the prompt.
        task: what is wanted from the model.
        prompts: several prompts, each a text or token ids, that are answered together.
        model: the model the row names, if it names one.
        echo: put the prompt before the answer (completions).
        report_logprobs: the row asked for logprobs.
        report_prompt_logprobs: the row asked for prompt_logprobs by that name.
        add_special_tokens: let the tokenizer add its own (completions).
        parse_special: special tokens spelled in the row's text become those tokens.
        tools, template_kwargs, add_generation_prompt, continue_final_message: for the
            chat template.
        chat_template: used instead of the model's.
        tool_names: functions whose calls are split out of the answer.
        continuation: what is scored after the prompt (score).
        prompt_cache: modules of a schema that stand before the prompt.
        pooling, base64, normalize: which embedding, and how it is written.
    """

    line: int
    custom_id: str
    endpoint: str
    params: SamplingParams
    task: Task = Task.GENERATE
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    prompts: list[Prompt] | None = None
    model: str | None = None
    echo: bool = False
    report_logprobs: bool = False
    report_prompt_logprobs: bool = False
    add_special_tokens: bool = True
    parse_special: bool = False
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    tool_names: frozenset[str] = frozenset()
    continuation: str | list[int] | None = None
    prompt_cache: PromptCall | None = None
    pooling: str = "mean"
    base64: bool = False
    normalize: bool = True

    @property
    def is_chat(self) -> bool:
        """Answered as a chat completion rather than a text completion."""
        return self.endpoint == CHAT


def parse_row(row: InputRow) -> ParsedRow:
    """Check a row's body and return it as a ParsedRow.

    Raises:
        RequestError: with the row's line, and the parameter at fault.
    """
    try:
        check_names(row)
        body = {name: value for name, value in row.body.items() if value is not None}
        return _PARSERS[row.endpoint](row, body)
    except RequestError as error:
        error.line = row.line
        raise


def _sampling(body: dict[str, Any], **instead: Any) -> SamplingParams:
    given = {name: value for name, value in body.items() if name in _SAMPLING_NAMES}
    given |= instead
    try:
        key = marshal.dumps(given, 2)  # unlike JSON it tells 1 from 1.0 and keeps nan
    except ValueError:  # values that are not JSON's
        return validate_params(**given)
    return _validated(key)


@lru_cache(maxsize=256)
def _validated(key: bytes) -> SamplingParams:
    """Most rows of a file have the same parameters; they are checked once."""
    return validate_params(**marshal.loads(key))


def _common(row: InputRow, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "line": row.line,
        "custom_id": row.custom_id,
        "endpoint": row.endpoint,
        "model": checks.text("model", body["model"], max_chars=4096) if "model" in body else None,
        "parse_special": checks.boolean("parse_special", body.get("parse_special", False)),
    }


def _parse_chat(row: InputRow, body: dict[str, Any]) -> ParsedRow:
    if "messages" not in body:
        checks.fail("messages", "is missing", code="missing_required_parameter")
    continues = checks.boolean("continue_final_message", body.get("continue_final_message", False))
    add_prompt = checks.boolean(
        "add_generation_prompt", body.get("add_generation_prompt", not continues)
    )
    if continues and add_prompt:
        checks.fail("continue_final_message", "and add_generation_prompt exclude each other")
    messages = check_messages(body["messages"])
    if continues and messages[-1]["role"] != "assistant":
        checks.fail("continue_final_message", "needs the last message to be the assistant's")
    tools = check_tools(body["tools"]) if body.get("tools") else None
    callable_tools = tools if tools and body.get("tool_choice") != "none" else ()
    params = _sampling(body, logprobs=_chat_logprobs(body))
    return ParsedRow(
        **_common(row, body),
        params=params,
        report_logprobs=params.logprobs is not None,
        report_prompt_logprobs="prompt_logprobs" in body,
        messages=messages,
        tools=tools,
        tool_names=frozenset(tool["function"]["name"] for tool in callable_tools),
        template_kwargs=check_template_kwargs(body.get("chat_template_kwargs", {})),
        add_generation_prompt=add_prompt,
        continue_final_message=continues,
        chat_template=_chat_template(body),
    )


def _chat_logprobs(body: dict[str, Any]) -> int | None:
    """logprobs is a switch in chat; top_logprobs is how many."""
    wanted = checks.boolean("logprobs", body.get("logprobs", False))
    if "top_logprobs" not in body:
        return 0 if wanted else None
    top = checks.integer("top_logprobs", body["top_logprobs"], 0, MAX_LOGPROBS)
    if not wanted and top > 0:
        checks.fail("top_logprobs", f"is {top} but logprobs is off; set logprobs to true")
    return top if wanted else None


def _chat_template(body: dict[str, Any]) -> str | None:
    if "chat_template" not in body:
        return None
    return checks.text("chat_template", body["chat_template"], max_chars=MAX_TEMPLATE_CHARS)


def _parse_completion(row: InputRow, body: dict[str, Any]) -> ParsedRow:
    prompts = _prompts(body)
    echo = checks.boolean("echo", body.get("echo", False))
    if isinstance(body.get("logprobs"), bool):
        checks.fail("logprobs", "must be a whole number for completions, such as 5")
    scores_prompt = echo and _generates_nothing(body)
    params = _scoring(body) if scores_prompt else _sampling(body)
    if "best_of" in body and checks.integer("best_of", body["best_of"], 1, 2**31) != params.n:
        checks.fail("best_of", f"differs from n, which is {params.n}; it is not supported")
    if echo and params.logprobs is not None and params.prompt_logprobs is None:
        # An echoed prompt comes with its log-probabilities, as many as the answer's.
        params = replace(params, prompt_logprobs=params.logprobs)
    return ParsedRow(
        **_common(row, body),
        params=params,
        task=Task.SCORE if scores_prompt else Task.GENERATE,
        **_one_or_many(prompts),
        echo=echo,
        report_logprobs=params.logprobs is not None,
        report_prompt_logprobs="prompt_logprobs" in body,
        add_special_tokens=_adds_special_tokens(body),
        prompt_cache=_prompt_cache(body, prompts, echo=echo),
    )


def _prompt_cache(body: dict[str, Any], prompts: list[Prompt], *, echo: bool) -> PromptCall | None:
    if "prompt_cache" not in body:
        return None
    call = parse_call(body["prompt_cache"])
    if len(prompts) > 1:
        checks.fail("prompt", f"is a list of {len(prompts)}; with prompt_cache give one text")
    if echo or "prompt_logprobs" in body:
        checks.fail("prompt_cache", "excludes echo and prompt_logprobs; remove it or them")
    if "add_special_tokens" in body:
        checks.fail("add_special_tokens", "has no meaning with prompt_cache; remove it")
    return call


def _adds_special_tokens(body: dict[str, Any]) -> bool:
    default = "prompt_cache" not in body  # then the text stands behind the schema's
    return checks.boolean("add_special_tokens", body.get("add_special_tokens", default))


def _generates_nothing(body: dict[str, Any]) -> bool:
    """Whether max_tokens, by whatever name, is given as 0."""
    given = [body[name] for name in MAX_TOKENS_ALIASES if name in body]
    return bool(given) and all(type(value) in (int, float) and value == 0 for value in given)


def _scoring(body: dict[str, Any]) -> SamplingParams:
    """Parameters of a completion that only scores its prompt: echo with max_tokens 0."""
    rest = {name: value for name, value in body.items() if name not in MAX_TOKENS_ALIASES}
    params = _sampling(rest, max_tokens=1)
    if params.n != 1:
        checks.fail("n", f"is {params.n}, but nothing is generated; remove it")
    return params


def _parse_embedding(row: InputRow, body: dict[str, Any]) -> ParsedRow:
    if "input" not in body:
        checks.fail("input", "is missing", code="missing_required_parameter")
    return ParsedRow(
        **_common(row, body),
        params=_UNSAMPLED,
        task=Task.EMBED,
        **_one_or_many(_texts_or_token_ids("input", body["input"])),
        add_special_tokens=_adds_special_tokens(body),
        pooling=_one_of("pooling", body.get("pooling", "mean"), ("mean", "last")),
        base64=_one_of("encoding_format", body.get("encoding_format", "float"), _FORMATS)
        == "base64",
        normalize=checks.boolean("normalize", body.get("normalize", True)),
    )


def _parse_score(row: InputRow, body: dict[str, Any]) -> ParsedRow:
    for name in ("context", "continuation"):
        if name not in body:
            checks.fail(name, "is missing", code="missing_required_parameter")
    text, token_ids = _score_part("context", body["context"])
    after, after_ids = _score_part("continuation", body["continuation"])
    continuation = after if after is not None else after_ids
    if not continuation:
        checks.fail("continuation", "is empty; it needs at least one token to score")
    return ParsedRow(
        **_common(row, body),
        params=_UNSAMPLED,
        task=Task.SCORE,
        prompt=text,
        prompt_token_ids=token_ids,
        continuation=continuation,
        add_special_tokens=_adds_special_tokens(body),
    )


def _score_part(param: str, value: Any) -> tuple[str | None, list[int] | None]:
    """(text, None) or (None, token ids), which may be empty."""
    if isinstance(value, list):
        return None, checks.token_ids(param, value, MAX_PROMPT_TOKEN_IDS)
    return checks.text(param, value), None


def _one_of(param: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        checks.fail(param, f"is {checks.shown(value)}; it must be one of {', '.join(allowed)}")
    return value


def _prompts(body: dict[str, Any]) -> list[Prompt]:
    if "prompt" in body and "prompt_token_ids" in body:
        checks.fail("prompt", "and prompt_token_ids exclude each other")
    if "prompt_token_ids" in body:
        return [_some_token_ids("prompt_token_ids", body["prompt_token_ids"])]
    if "prompt" not in body:
        checks.fail("prompt", "is missing", code="missing_required_parameter")
    return _texts_or_token_ids("prompt", body["prompt"])


def _texts_or_token_ids(param: str, value: Any) -> list[Prompt]:
    """A text, token ids, or a list of them, as a list."""
    if not isinstance(value, list):
        return [checks.text(param, value)]
    if not value:
        checks.fail(param, "is empty; give a text, token ids, or a list of them")
    if not isinstance(value[0], str | list):
        return [_some_token_ids(param, value)]
    checks.items(param, value, MAX_PROMPTS)
    return [
        _some_token_ids(f"{param}[{index}]", item)
        if isinstance(item, list)
        else checks.text(f"{param}[{index}]", item)
        for index, item in enumerate(value)
    ]


def _one_or_many(prompts: list[Prompt]) -> dict[str, Any]:
    """The field of a ParsedRow that these prompts are; a list of one counts as that one."""
    if len(prompts) > 1:
        return {"prompts": prompts}
    return {"prompt" if isinstance(prompts[0], str) else "prompt_token_ids": prompts[0]}


def _some_token_ids(param: str, value: Any) -> list[int]:
    ids = checks.token_ids(param, value, MAX_PROMPT_TOKEN_IDS)
    if not ids:
        checks.fail(param, "is empty; it needs at least one token")
    return ids


_PARSERS = {
    CHAT: _parse_chat,
    COMPLETIONS: _parse_completion,
    EMBEDDINGS: _parse_embedding,
    SCORE: _parse_score,
    SCORE_ALIAS: _parse_score,
}
