"""From an input row's body to a ParsedRow: every parameter known, checked and bounded.

No tokenizer is needed here, so a file can be checked in seconds. What depends on the model (the
vocabulary, the context, the chat template) is checked in `prepare.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batchwright.errors import RequestError
from batchwright.job.names import check_names
from batchwright.job.rows import CHAT, InputRow
from batchwright.request import SamplingParams
from batchwright.validation import checks
from batchwright.validation.messages import check_messages, check_tools
from batchwright.validation.params import (
    MAX_LOGPROBS,
    MAX_TOKENS_ALIASES,
    PARAM_NAMES,
    validate_params,
)

MAX_PROMPT_TOKEN_IDS = 10_000_000
MAX_TEMPLATE_KWARGS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRow:
    """A row that is sound as far as can be told without the model.

    Exactly one of messages, prompt and prompt_token_ids is set.

    Attributes:
        line, custom_id, endpoint: as in InputRow.
        params: how to sample.
        model: the model the row names, if it names one.
        echo: put the prompt before the answer (completions).
        report_prompt_logprobs: the row asked for prompt_logprobs by that name.
        add_special_tokens: let the tokenizer add its own (completions).
        parse_special: special tokens spelled in the row's text become those tokens.
        tools, template_kwargs, add_generation_prompt, continue_final_message: for the
            chat template.
    """

    line: int
    custom_id: str
    endpoint: str
    params: SamplingParams
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    model: str | None = None
    echo: bool = False
    report_prompt_logprobs: bool = False
    add_special_tokens: bool = True
    parse_special: bool = False
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

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
        return _parse_chat(row, body) if row.endpoint == CHAT else _parse_completion(row, body)
    except RequestError as error:
        error.line = row.line
        raise


def _sampling(body: dict[str, Any], **instead: Any) -> SamplingParams:
    names = PARAM_NAMES | set(MAX_TOKENS_ALIASES)
    given = {name: value for name, value in body.items() if name in names}
    return validate_params(**(given | instead))


def _common(row: InputRow, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "line": row.line,
        "custom_id": row.custom_id,
        "endpoint": row.endpoint,
        "model": checks.text("model", body["model"], max_chars=4096) if "model" in body else None,
        "report_prompt_logprobs": "prompt_logprobs" in body,
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
    return ParsedRow(
        **_common(row, body),
        params=_sampling(body, logprobs=_chat_logprobs(body)),
        messages=messages,
        tools=check_tools(body["tools"]) if body.get("tools") else None,
        template_kwargs=_template_kwargs(body.get("chat_template_kwargs", {})),
        add_generation_prompt=add_prompt,
        continue_final_message=continues,
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


def _template_kwargs(value: Any) -> dict[str, Any]:
    param = "chat_template_kwargs"
    if not isinstance(value, dict):
        checks.fail(param, f"must be an object, not {checks.shown(value)}")
    if len(value) > MAX_TEMPLATE_KWARGS:
        checks.fail(param, f"has {len(value)} entries; at most {MAX_TEMPLATE_KWARGS} are allowed")
    return value


def _parse_completion(row: InputRow, body: dict[str, Any]) -> ParsedRow:
    prompt, prompt_token_ids = _prompt(body)
    echo = checks.boolean("echo", body.get("echo", False))
    if isinstance(body.get("logprobs"), bool):
        checks.fail("logprobs", "must be a whole number for completions, such as 5")
    params = _sampling(body)
    if "best_of" in body and checks.integer("best_of", body["best_of"], 1, 2**31) != params.n:
        checks.fail("best_of", f"differs from n, which is {params.n}; it is not supported")
    if echo and params.logprobs is not None and params.prompt_logprobs is None:
        # An echoed prompt comes with its log-probabilities, as many as the answer's.
        params = _sampling(body, prompt_logprobs=params.logprobs)
    return ParsedRow(
        **_common(row, body),
        params=params,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        echo=echo,
        add_special_tokens=checks.boolean(
            "add_special_tokens", body.get("add_special_tokens", True)
        ),
    )


def _prompt(body: dict[str, Any]) -> tuple[str | None, list[int] | None]:
    """(text, None) or (None, token ids); a list with one string counts as that string."""
    if "prompt" in body and "prompt_token_ids" in body:
        checks.fail("prompt", "and prompt_token_ids exclude each other")
    if "prompt_token_ids" in body:
        value = body["prompt_token_ids"]
        return None, _some_token_ids("prompt_token_ids", value)
    if "prompt" not in body:
        checks.fail("prompt", "is missing", code="missing_required_parameter")
    value = body["prompt"]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, list) and value and not isinstance(value[0], str | list):
        return None, _some_token_ids("prompt", value)
    if isinstance(value, list):
        checks.fail("prompt", f"is a list of {len(value)}; give one prompt a row")
    return checks.text("prompt", value), None


def _some_token_ids(param: str, value: Any) -> list[int]:
    ids = checks.token_ids(param, value, MAX_PROMPT_TOKEN_IDS)
    if not ids:
        checks.fail(param, "is empty; it needs at least one token")
    return ids
