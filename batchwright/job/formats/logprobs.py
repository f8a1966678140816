"""Log-probabilities as response bodies have them: the chat form, the completions form, vLLM's."""

from __future__ import annotations

from typing import Any

from batchwright.job.answer import TokenBytes
from batchwright.request import Result, TokenLogprob

MIN_LOGPROB = -9999.0
"""JSON has no -inf; the hosted API writes this instead, and so do we."""


def chat_logprob(entry: TokenLogprob, token_bytes: TokenBytes) -> dict[str, Any]:
    """One token of a chat's answer, with its rivals."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        return {
            "token": token_text(raw),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(raw),
        }

    top = [one(token_id, logprob) for token_id, logprob in entry.top]
    return {**one(entry.token_id, entry.logprob), "top_logprobs": top}


def text_logprobs(
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


def prompt_logprobs(
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
