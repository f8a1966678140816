"""How a row wants its answer written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from batchwright.job.validate import ParsedRow
from batchwright.request import NO_MARKUP, Markup, Request

TokenBytes = Callable[[int], bytes]
"""The bytes that a token id stands for; they need not be whole UTF-8 characters."""


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How a row wants its answer written.

    Attributes:
        endpoint: decides the kind of body.
        echo: the prompt comes before the answer's text and log-probabilities (completions).
        logprobs: the row asked for log-probabilities.
        prompt_logprobs: the row asked for prompt_logprobs by that name.
        markup: what a chat's answer is split by.
        tool_names: functions whose calls are split out of a chat's answer; none: no call is.
        base64: an embedding is written as base64 of little-endian float32.
        normalize: an embedding is scaled to length 1.
    """

    endpoint: str
    echo: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    markup: Markup = NO_MARKUP
    tool_names: frozenset[str] = frozenset()
    base64: bool = False
    normalize: bool = True


def answer_form(row: ParsedRow, request: Request) -> AnswerForm:
    """The form of a row's answer.

    Args:
        row: the row.
        request: what `prepare_rows` made of it.
    """
    return AnswerForm(
        row.endpoint,
        echo=row.echo,
        logprobs=row.report_logprobs,
        prompt_logprobs=row.report_prompt_logprobs,
        markup=request.markup,
        tool_names=row.tool_names,
        base64=row.base64,
        normalize=row.normalize,
    )


def response_id(custom_id: str) -> str:
    """A short id that is a pure function of the row's name, so that runs can be compared."""
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
