"""Joining a context and a continuation into the tokens whose log-likelihood is asked for.

The rule is lm-evaluation-harness's: white space that ends the context goes to the continuation, so
that a word keeps the token it has in running text; then what the two texts together have beyond the
context's own number of tokens is the continuation. An empty context is the model's begin (or end)
token. Token ids are joined as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Part = str | Sequence[int]


class Tokenizer(Protocol):
    """What joining needs of `text.tokenizer.Tokenizer`."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[list[int]]: ...


def prefix_token_id(tokenizer: Tokenizer) -> int:
    """What stands before a text that has no context: the begin token, else the end token."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0


def join(
    tokenizer: Tokenizer,
    context: Part,
    continuation: Part,
    *,
    add_special_tokens: bool = True,
    parse_special: bool = False,
) -> tuple[list[int], int]:
    """Encode a pair.

    Args:
        context, continuation: texts, or token ids.
        add_special_tokens: the tokenizer adds its own to a context that is text.
        parse_special: special tokens spelled in a text become those tokens.
    Returns:
        (token ids of both, number of context tokens, at least 1).
    Raises:
        RequestError: the vocabulary cannot express a text.
    """

    def encode(*texts: str, start: bool) -> list[list[int]]:
        return tokenizer.encode_batch(
            texts, add_special_tokens=start and add_special_tokens, parse_special=parse_special
        )

    if isinstance(context, str) and isinstance(continuation, str):
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        if context:
            ids, whole = encode(context, context + continuation, start=True)
            return ids + whole[len(ids) :], len(ids)
    if isinstance(context, str):
        before = encode(context, start=True)[0] if context else []
    else:
        before = list(context)
    after = encode(continuation, start=False)[0] if isinstance(continuation, str) else continuation
    before = before or [prefix_token_id(tokenizer)]
    return [*before, *after], len(before)
