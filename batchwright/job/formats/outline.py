"""The outline of a row: what an order over a whole input needs of it, without tokens or text.

A prompt becomes one number for each 128 bytes of its JSON text, which equal prefixes have in common
(about as many bytes as a block of 32 tokens has). Two different pieces could have the same number;
rows would then start at another time than they should, and nothing else.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import msgspec

from batchwright.job.rows import EMBEDDINGS, SCORE, SCORE_ALIAS, InputRow
from batchwright.request import DEFAULT_MAX_TOKENS
from batchwright.validation.params import MAX_TOKENS_ALIASES

PIECE_BYTES = 128
BYTES_PER_TOKEN = 4
TOKENS_PER_PIECE = PIECE_BYTES // BYTES_PER_TOKEN

_PROMPT_KEYS = ("tools", "messages", "prompt", "prompt_token_ids", "input", "context")
"""In the order in which a prompt begins with them; continuations come last and are one's own."""


_MAX_GUESS = 2**20  # what the row gives is not checked yet

_encode = msgspec.json.Encoder().encode


class Outline(NamedTuple):
    """What a row is about, roughly.

    Attributes:
        pieces: numbers of its prompt's pieces, in order; only whole ones.
        num_prompt_tokens: of all its prompts, guessed from their bytes.
        num_output_tokens: that it may have, over all its samples.
    """

    pieces: list[int]
    num_prompt_tokens: int
    num_output_tokens: int


def outline(row: InputRow) -> Outline:
    """The outline of a row, whether or not it is sound."""
    body = row.body
    text = _encode([body[key] for key in _PROMPT_KEYS if key in body])
    pieces = [
        zlib.crc32(text[start : start + PIECE_BYTES])
        for start in range(0, len(text) - PIECE_BYTES + 1, PIECE_BYTES)
    ]
    num_output = 0
    if row.endpoint not in (EMBEDDINGS, SCORE, SCORE_ALIAS):
        num_output = _output_limit(body) * _number(body.get("n"), 1)
    return Outline(pieces, len(text) // BYTES_PER_TOKEN, num_output)


def _output_limit(body: dict[str, Any]) -> int:
    given = next((body[key] for key in MAX_TOKENS_ALIASES if key in body), None)
    return _number(given, DEFAULT_MAX_TOKENS)


def _number(value: Any, otherwise: int) -> int:
    if isinstance(value, int) and 0 <= value <= _MAX_GUESS:
        return value
    return otherwise
