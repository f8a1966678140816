"""Results as OpenAI response bodies: `chat.completion` and `text_completion`.

Fields that vLLM adds to the hosted API's (`stop_reason`, `prompt_logprobs`) have vLLM's form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from batchwright.request import Completion, Result, TokenLogprob

MIN_LOGPROB = -9999.0
"""JSON has no -inf; the hosted API writes this instead, and so do we."""

TokenBytes = Callable[[int], bytes]
"""The bytes that a token id stands for; they need not be whole UTF-8 characters."""


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How a row wants its answer written.

    Attributes:
        chat: a chat completion; otherwise a text completion.
        echo: the prompt comes before the answer's text and log-probabilities.
        prompt_logprobs: the row asked for prompt_logprobs by that name.
    """

    chat: bool
    echo: bool = False
    prompt_logprobs: bool = False


def response_id(custom_id: str) -> str:
    """A short id that is a pure function of the row's name, so that runs can be compared."""
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def response_body(
    result: Result, form: AnswerForm, token_bytes: TokenBytes, *, model: str, created: int
) -> dict[str, Any]:
    """The body of a finished row's response.

    Args:
        result: without an error, each output finished by stop or length.
        form: how the row wants it.
        token_bytes: used only if log-probabilities or an echo of token ids were asked for.
        model: the name to put in the body.
        created: seconds since 1970, of the job.
    """
    make_choice = _chat_choice if form.chat else _text_choice
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if form.chat else 'cmpl'}-{response_id(result.request_id)}",
        "object": "chat.completion" if form.chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [make_choice(result, output, form, token_bytes) for output in result.outputs],
        "usage": _usage(result),
    }
    if form.chat and form.prompt_logprobs:
        body["prompt_logprobs"] = _prompt_logprobs(result, token_bytes)
    return body


def _usage(result: Result) -> dict[str, Any]:
    num_prompt = len(result.prompt_token_ids)
    num_output = sum(len(output.token_ids) for output in result.outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": result.num_cached_tokens},
    }


def _chat_choice(
    result: Result, output: Completion, form: AnswerForm, token_bytes: TokenBytes
) -> dict[str, Any]:
    logprobs = None
    if output.logprobs is not None:
        logprobs = {"content": [_chat_logprob(entry, token_bytes) for entry in output.logprobs]}
    return {
        "index": output.index,
        "message": {"role": "assistant", "content": output.text},
        "logprobs": logprobs,
        "finish_reason": str(output.finish_reason),
        "stop_reason": output.stop_reason,
    }


def _text_choice(
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
        "finish_reason": str(output.finish_reason),
        "stop_reason": output.stop_reason,
    }
    if entries is not None:
        choice["logprobs"] = _text_logprobs(result, [*given, *entries], len(entries), token_bytes)
    if form.prompt_logprobs:
        choice["prompt_logprobs"] = _prompt_logprobs(result, token_bytes)
    return choice


def _prompt_text(result: Result, token_bytes: TokenBytes) -> str:
    if result.prompt is not None:
        return result.prompt
    return b"".join(map(token_bytes, result.prompt_token_ids)).decode("utf-8", "replace")


def _chat_logprob(entry: TokenLogprob, token_bytes: TokenBytes) -> dict[str, Any]:
    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        return {
            "token": token_text(raw),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(raw),
        }

    top = [one(token_id, logprob) for token_id, logprob in entry.top]
    return {**one(entry.token_id, entry.logprob), "top_logprobs": top}


def _text_logprobs(
    result: Result,
    entries: list[TokenLogprob | None],
    num_output: int,
    token_bytes: TokenBytes,
) -> dict[str, Any]:
    """Log-probabilities as /v1/completions has them: four lists, one place per token.

    The last num_output entries are the answer's, those before it the echoed prompt's. Only the
    first token of a prompt has no entry; text_offset counts characters from the start of the
    choice's text.
    """
    tokens: list[str] = []
    logprobs: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets: list[int] = []
    offset = 0
    num_prompt = len(entries) - num_output
    for index, entry in enumerate(entries):
        if index < num_prompt:
            token_id = result.prompt_token_ids[index]
        else:
            assert entry is not None
            token_id = entry.token_id
        if entry is None:
            logprobs.append(None)
            top.append(None)
        else:
            logprobs.append(max(entry.logprob, MIN_LOGPROB))
            pairs = [*entry.top, (token_id, entry.logprob)]
            top.append({token_text(token_bytes(i)): max(p, MIN_LOGPROB) for i, p in pairs})
        raw = token_bytes(token_id)
        tokens.append(token_text(raw))
        offsets.append(offset)
        # Bytes that begin a character count; those that continue one belong to the token before.
        offset += sum(byte & 0xC0 != 0x80 for byte in raw)
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _prompt_logprobs(
    result: Result, token_bytes: TokenBytes
) -> list[dict[str, dict[str, Any]] | None]:
    """As vLLM writes them: per prompt token, token id -> logprob, rank and text; null first."""
    lines: list[dict[str, dict[str, Any]] | None] = []
    for given_id, entry in zip(result.prompt_token_ids, result.prompt_logprobs or [], strict=False):
        if entry is None:
            lines.append(None)
            continue
        ranked = [(token_id, p, rank) for rank, (token_id, p) in enumerate(entry.top, start=1)]
        ranked.append((given_id, entry.logprob, entry.rank))
        lines.append(
            {
                str(token_id): {
                    "logprob": max(logprob, MIN_LOGPROB),
                    "rank": rank,
                    "decoded_token": token_text(token_bytes(token_id)),
                }
                for token_id, logprob, rank in ranked
            }
        )
    return lines


def token_text(raw: bytes) -> str:
    """A token's text; bytes that are not whole characters are spelled `bytes:\\xe2\\x80`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
