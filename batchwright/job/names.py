"""Which parameters a row may name: those that work, those without effect, those not supported.

A parameter is never ignored in silence. It is sampled with, used in the prompt, known to have no
effect on the answer, or an error.
"""

from __future__ import annotations

from typing import Any

from batchwright.errors import RequestError
from batchwright.job.rows import CHAT, InputRow
from batchwright.validation import checks
from batchwright.validation.params import MAX_TOKENS_ALIASES, PARAM_NAMES

# Accepted and without effect on the answer: bookkeeping of the hosted API.
_INERT = frozenset(
    "user metadata store service_tier prompt_cache_key prompt_cache_retention "
    "safety_identifier".split()
)

# Known, but only these values work; the text says why or what to do instead.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "stream": ((False,), "results are written as rows finish; remove it"),
    "stream_options": ((), "results are not streamed; remove it"),
    "response_format": (({"type": "text"},), "structured output is not supported yet"),
    "structured_outputs": ((), "structured output is not supported yet"),
    "guided_json": ((), "structured output is not supported yet"),
    "guided_regex": ((), "structured output is not supported yet"),
    "guided_choice": ((), "structured output is not supported yet"),
    "guided_grammar": ((), "structured output is not supported yet"),
    "spaces_between_special_tokens": ((True,), "not supported"),
    "truncate_prompt_tokens": ((), "prompts are never cut; shorten the prompt"),
    "use_beam_search": ((False,), "beam search is not supported yet"),
    "length_penalty": ((1, 1.0), "beam search is not supported yet"),
    "bad_words": (([],), "not supported yet; use logit_bias"),
    "allowed_token_ids": ((), "not supported yet; use logit_bias"),
    "priority": ((0,), "not supported yet"),
    "return_token_ids": ((False,), "not supported yet"),
}
_ONLY_CHAT: dict[str, tuple[tuple[Any, ...], str]] = {
    "tool_choice": (("auto", "none"), "a forced tool call is not supported yet"),
    "parallel_tool_calls": ((True,), "tool calls are returned as text"),
    "functions": ((), "use tools"),
    "function_call": ((), "use tools"),
    "modalities": ((["text"],), "only text is supported"),
    "audio": ((), "only text is supported"),
    "prediction": ((), "not supported"),
    "web_search_options": ((), "rows never make network requests"),
    "reasoning_effort": ((), "pass it in chat_template_kwargs if the model's template knows it"),
    "documents": ((), "pass them in chat_template_kwargs if the model's template knows them"),
    "chat_template": ((), "the template belongs to the model"),
    "add_special_tokens": ((False,), "the chat template writes the special tokens"),
    "echo": ((False,), "it is for /v1/completions"),
}
_ONLY_COMPLETIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "insertion is not supported"),
}

_CHAT_KEYS = frozenset(
    "messages tools chat_template_kwargs add_generation_prompt continue_final_message "
    "top_logprobs".split()
)
_COMPLETION_KEYS = frozenset("prompt prompt_token_ids echo add_special_tokens best_of".split())
_SHARED_KEYS = (
    PARAM_NAMES | set(MAX_TOKENS_ALIASES) | _INERT | _ONLY.keys() | {"model", "parse_special"}
)


def check_names(row: InputRow) -> None:
    """Reject parameters that nobody knows, and values of known ones that are not supported.

    Raises:
        RequestError: with the parameter's name and what to do instead.
    """
    chat = row.endpoint == CHAT
    only = _ONLY | (_ONLY_CHAT if chat else _ONLY_COMPLETIONS)
    known = _SHARED_KEYS | only.keys() | (_CHAT_KEYS if chat else _COMPLETION_KEYS)
    for name, value in row.body.items():
        if name not in known:
            checks.unknown(name, known)
        if value is None or name not in only:
            continue
        allowed, remedy = only[name]
        if not any(type(value) is type(good) and value == good for good in allowed):
            raise RequestError(
                f"{name} is {checks.shown(value)}: {remedy}",
                code="unsupported_parameter",
                param=name,
            )
