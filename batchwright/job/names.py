"""Which parameters a row may name: those that work, those without effect, those not supported.

A parameter is never ignored in silence. It is sampled with, used in the prompt, known to have no
effect on the answer, or an error.
"""

from __future__ import annotations

from typing import Any

from batchwright.errors import RequestError
from batchwright.job.rows import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    SCORE,
    SCORE_ALIAS,
    InputRow,
)
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
    "tool_choice": (
        ("auto", "none"),
        "a forced tool call is not supported yet; give auto or none, or ask for the arguments with "
        "response_format",
    ),
    "parallel_tool_calls": ((True,), "all calls of an answer are returned; remove it"),
    "functions": ((), "use tools"),
    "function_call": ((), "use tools"),
    "modalities": ((["text"],), "only text is supported"),
    "audio": ((), "only text is supported"),
    "prediction": ((), "not supported"),
    "web_search_options": ((), "rows never make network requests"),
    "reasoning_effort": (
        (),
        "pass it in chat_template_kwargs if the model's template knows it, or remove it",
    ),
    "verbosity": (("medium",), "only medium, the default, is known; ask for it in the messages"),
    "documents": ((), "pass them in chat_template_kwargs if the model's template knows them"),
    "add_special_tokens": ((False,), "the chat template writes the special tokens"),
    "echo": ((False,), "it is for /v1/completions"),
    "prompt_cache": (
        (),
        "it is for /v1/completions; write the marks of the chat in the schema and the prompt, with "
        "parse_special",
    ),
}
_ONLY_COMPLETIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "insertion is not supported"),
}

_CHAT_KEYS = frozenset(
    "messages tools chat_template chat_template_kwargs add_generation_prompt "
    "continue_final_message top_logprobs".split()
)
_COMPLETION_KEYS = frozenset(
    "prompt prompt_token_ids prompt_cache echo add_special_tokens best_of".split()
)
_SHARED_KEYS = (
    PARAM_NAMES | set(MAX_TOKENS_ALIASES) | _INERT | _ONLY.keys() | {"model", "parse_special"}
)

_ONLY_EMBEDDINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "dimensions": ((), "an embedding has the model's hidden size; remove it"),
    "messages": ((), "give the text as input"),
}
_ONLY_SCORE: dict[str, tuple[tuple[Any, ...], str]] = dict.fromkeys(
    ("text_1", "text_2", "queries", "documents"),
    ((), "scores are log-likelihoods; give context and continuation"),
)
_ONLY_UNSAMPLED = {
    name: _ONLY[name] for name in ("stream", "stream_options", "truncate_prompt_tokens", "priority")
}
_UNSAMPLED_KEYS = _INERT | {"model", "parse_special", "add_special_tokens"}
_EMBEDDING_KEYS = frozenset("input encoding_format pooling normalize".split())
_SCORE_KEYS = frozenset("context continuation".split())

_PROMPT_TEXTS = frozenset("suffix prediction documents messages text_1 text_2 queries".split())

_Only = dict[str, tuple[tuple[Any, ...], str]]


def _table(keys: frozenset[str], *onlys: _Only) -> tuple[frozenset[str], _Only]:
    """(all names that are known, those with restricted values)."""
    only: _Only = {}
    for part in onlys:
        only |= part
    return keys | only.keys(), only


_TABLES = {
    CHAT: _table(_SHARED_KEYS | _CHAT_KEYS, _ONLY, _ONLY_CHAT),
    COMPLETIONS: _table(_SHARED_KEYS | _COMPLETION_KEYS, _ONLY, _ONLY_COMPLETIONS),
    EMBEDDINGS: _table(_UNSAMPLED_KEYS | _EMBEDDING_KEYS, _ONLY_UNSAMPLED, _ONLY_EMBEDDINGS),
    SCORE: _table(_UNSAMPLED_KEYS | _SCORE_KEYS, _ONLY_UNSAMPLED, _ONLY_SCORE),
}
_TABLES[SCORE_ALIAS] = _TABLES[SCORE]


def check_names(row: InputRow) -> None:
    """Reject parameters that nobody knows, and values of known ones that are not supported.

    Raises:
        RequestError: with the parameter's name and what to do instead.
    """
    known, only = _TABLES[row.endpoint]
    for name, value in row.body.items():
        if name not in known:
            checks.unknown(name, known)
        if name not in only or value is None:
            continue
        allowed, remedy = only[name]
        if not any(type(value) is type(good) and value == good for good in allowed):
            raise RequestError(
                f"{name} is {_shown(name, value)}: {remedy}",
                code="unsupported_parameter",
                param=name,
            )


def _shown(name: str, value: Any) -> str:
    return checks.kind_of(value) if name in _PROMPT_TEXTS else checks.shown(value)
