"""Bodies of /v1/completions: `text_completion`.

Fields that vLLM adds to the hosted API's (`stop_reason`, `prompt_logprobs`) have vLLM's form.
"""

from __future__ import annotations

from typing import Any

from batchwright.job.answer import AnswerForm, TokenBytes, response_id
from batchwright.job.formats.logprobs import prompt_logprobs, text_logprobs
from batchwright.job.formats.usage import usage
from batchwright.request import Completion, FinishReason, Result, TokenLogprob


def completion_body(
    result: Result, form: AnswerForm, token_bytes: TokenBytes, *, model: str, created: int
) -> dict[str, Any]:
    """See `response_body`. A prompt that was only scored is answered with an empty completion."""
    choices = [
        _choice(part, output, form, token_bytes)
        for index, part in enumerate(result.parts or [result])
        for output in (part.outputs if part.score is None else [_nothing(index, form)])
    ]
    return {
        "id": f"cmpl-{response_id(result.request_id)}",
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage(result),
    }


def _nothing(index: int, form: AnswerForm) -> Completion:
    """What max_tokens 0 gives."""
    return Completion(
        index=index,
        text="",
        token_ids=[],
        finish_reason=FinishReason.LENGTH,
        logprobs=[] if form.logprobs else None,
    )


def _choice(
    result: Result, output: Completion, form: AnswerForm, token_bytes: TokenBytes
) -> dict[str, Any]:
    text, entries = output.text, output.logprobs
    given: list[TokenLogprob | None] = []
    if form.echo:
        text = _prompt_text(result, token_bytes) + text
        given = result.prompt_logprobs or []
    choice = {
        "index": output.index,
        "text": text,
        "logprobs": None,
        "finish_reason": output.finish_reason.value,
        "stop_reason": output.stop_reason,
    }
    if entries is not None:
        choice["logprobs"] = text_logprobs(result, [*given, *entries], len(entries), token_bytes)
    if form.prompt_logprobs:
        choice["prompt_logprobs"] = prompt_logprobs(result, token_bytes)
    return choice


def _prompt_text(result: Result, token_bytes: TokenBytes) -> str:
    if result.prompt is not None:
        return result.prompt
    return b"".join(map(token_bytes, result.prompt_token_ids)).decode("utf-8", "replace")
