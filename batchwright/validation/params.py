"""Sampling parameters, checked: one validator for files and for Python callers.

Names and meanings are those of the OpenAI API and of vLLM; `request.SamplingParams` says what each
does. A value of None always means "the default". Everything is bounded, so that no single row can
ask for more than a fixed amount of work or memory besides its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from batchwright.errors import RequestError
from batchwright.repetition import RepetitionDetection
from batchwright.request import DEFAULT_MAX_TOKENS, SamplingParams
from batchwright.validation import checks
from batchwright.validation.structured import GRAMMAR_NAMES, take_grammar

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_SAMPLES = 128
MAX_LOGPROBS = 100
MAX_PATTERN_SIZE = 1024
MAX_PATTERN_COUNT = 100_000
MIN_TEMPERATURE = 1e-8  # below it logits divided by temperature could overflow float32
INT32_MAX = 2**31 - 1

MAX_TOKENS_ALIASES = ("max_tokens", "max_completion_tokens", "max_new_tokens")


def _stop(param: str, value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else checks.items(param, value, MAX_STOP_STRINGS)
    return tuple(
        checks.text(param, string, min_chars=1, max_chars=MAX_STOP_CHARS) for string in strings
    )


def _logit_bias(param: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        checks.fail(param, f"must be an object of token id: bias, not {checks.shown(value)}")
    if len(value) > MAX_LOGIT_BIAS:
        checks.fail(param, f"has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        token_id = int(key) if isinstance(key, str) and _is_token_id(key) else key
        token_id = checks.integer(f"{param} token id", token_id, 0, INT32_MAX)
        if token_id in bias:
            checks.fail(param, f"names token id {token_id} twice")
        bias[token_id] = checks.number(param, amount, -100.0, 100.0)
    return bias


def _is_token_id(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) <= 10


def _repetition_detection(param: str, value: Any) -> RepetitionDetection | None:
    if isinstance(value, RepetitionDetection):
        value = dataclasses.asdict(value)
    if not isinstance(value, Mapping):
        checks.fail(
            param,
            f"must be an object with max_pattern_size and min_count, not {checks.shown(value)}",
        )
    known = [field.name for field in dataclasses.fields(RepetitionDetection)]
    for name in value:
        if name not in known:
            checks.unknown(f"{param}.{name}", [f"{param}.{field}" for field in known])

    def size(name: str, low: int, high: int, default: int) -> int:
        given = value.get(name)
        return checks.integer(f"{param}.{name}", default if given is None else given, low, high)

    max_size = size("max_pattern_size", 0, MAX_PATTERN_SIZE, 0)
    if max_size == 0:  # vLLM's way to turn it off
        return None
    return RepetitionDetection(
        max_pattern_size=max_size,
        min_count=size("min_count", 2, MAX_PATTERN_COUNT, 0),
        min_pattern_size=size("min_pattern_size", 0, max_size, 1) or 1,
    )


def _temperature(param: str, value: Any) -> float:
    temperature = checks.number(param, value, 0.0, 100.0)
    if 0.0 < temperature < MIN_TEMPERATURE:
        checks.fail(param, f"is {temperature:g}; use 0 for greedy, or {MIN_TEMPERATURE:g} to 100")
    return temperature


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    return lambda param, value: checks.number(param, value, low, high)


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    return lambda param, value: checks.integer(param, value, low, high)


# One check per field of SamplingParams, under the field's own name.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _temperature,
    "top_k": lambda param, value: max(0, checks.integer(param, value, -1, INT32_MAX)),
    "top_p": _number(0.0, 1.0),
    "min_p": _number(0.0, 1.0),
    "repetition_penalty": _number(0.01, 100.0),
    "presence_penalty": _number(-2.0, 2.0),
    "frequency_penalty": _number(-2.0, 2.0),
    "logit_bias": _logit_bias,
    "max_tokens": _integer(1, INT32_MAX),
    "min_tokens": _integer(0, INT32_MAX),
    "stop": _stop,
    "include_stop_str_in_output": checks.boolean,
    "stop_token_ids": lambda param, value: tuple(
        checks.token_ids(param, value, MAX_STOP_TOKEN_IDS)
    ),
    "ignore_eos": checks.boolean,
    "repetition_detection": _repetition_detection,
    "n": _integer(1, MAX_SAMPLES),
    "seed": _integer(-(2**63), 2**63 - 1),
    "logprobs": _integer(0, MAX_LOGPROBS),
    "prompt_logprobs": _integer(0, MAX_LOGPROBS),
    "skip_special_tokens": checks.boolean,
}

PARAM_NAMES = frozenset(_CHECKS) | set(GRAMMAR_NAMES)
_KNOWN = PARAM_NAMES | set(MAX_TOKENS_ALIASES)
_GRAMMAR_FIELDS = frozenset({"grammar", *GRAMMAR_NAMES})


def validate_params(**given: Any) -> SamplingParams:
    """Check sampling parameters and return them as SamplingParams.

    Accepts the fields of SamplingParams, the aliases of max_tokens, and what rows name instead of
    `grammar` (GRAMMAR_NAMES). None means the default.

    Raises:
        RequestError: an unknown name (with the closest known one), a wrong type, a value out of
            range, or two values that contradict each other; `param` names the culprit.
    """
    for name in given:
        if name not in _KNOWN and name != "grammar":
            checks.unknown(name, _KNOWN)
    fields = {name: value for name, value in given.items() if value is not None}
    _merge_aliases(fields)
    grammar = None if _GRAMMAR_FIELDS.isdisjoint(fields) else take_grammar(fields)
    values = {name: _CHECKS[name](name, value) for name, value in fields.items()}
    if values.get("top_p") == 0.0:
        values.update(top_p=1.0, top_k=1)  # the hosted API allows 0: the likeliest token alone
    params = SamplingParams(**values, grammar=grammar)
    limit = params.max_tokens or DEFAULT_MAX_TOKENS
    if params.min_tokens > limit:
        raise RequestError(
            f"min_tokens is {params.min_tokens} and max_tokens {limit}; "
            "min_tokens must not exceed max_tokens",
            param="min_tokens",
        )
    if grammar is not None and params.ignore_eos:
        checks.fail("ignore_eos", "contradicts structured output, which ends with its grammar")
    return params


def check_params(params: SamplingParams) -> SamplingParams:
    """The same checks for SamplingParams that a Python caller built; returns a normalised copy.

    Raises:
        RequestError: as `validate_params`; also if this is something else.
    """
    if not isinstance(params, SamplingParams):
        checks.fail("params", f"must be SamplingParams, not {checks.shown(params)}")
    return validate_params(
        **{field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    )


def _merge_aliases(fields: dict[str, Any]) -> None:
    """Leave one value under "max_tokens", whichever spellings gave it."""
    names = [name for name in MAX_TOKENS_ALIASES if name in fields]
    if not names or names == ["max_tokens"]:
        return
    given = {name: fields.pop(name) for name in names}
    name, value = next(iter(given.items()))
    for other, other_value in given.items():
        if other_value != value:
            raise RequestError(
                f"{name} is {checks.shown(value)} but {other} is {checks.shown(other_value)}; "
                "they mean the same, give one",
                param=other,
            )
    fields["max_tokens"] = checks.integer(name, value, 1, INT32_MAX)
