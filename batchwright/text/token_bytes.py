"""The bytes that single tokens stand for.

Decoding one token alone is not enough for log-probabilities: a token may be part of a character,
and some decoders drop a leading space at the start of a text. Here a token's own spelling in the
vocabulary is read back, by the rules of the tokenizer's decoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers

from batchwright.text.byte_alphabet import CHAR_TO_BYTE

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(backend: tokenizers.Tokenizer) -> Callable[[int], bytes]:
    """A function from token id to bytes, for one tokenizer.

    Knows byte-level vocabularies (GPT-2's alphabet of 256 printable characters) and SentencePiece
    ones (a mark for spaces, `<0x0A>` for bytes). Others are taken to spell their tokens as they
    are. An id without a token has no bytes.
    """
    literal = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    kinds = list(_decoders(backend))
    names = {kind["type"] for kind in kinds}
    to_byte = CHAR_TO_BYTE if "ByteLevel" in names else None
    space = next((kind["replacement"] for kind in kinds if kind["type"] == "Metaspace"), None)
    spaces = [(kind["pattern"]["String"], kind["content"]) for kind in kinds if _is_replace(kind)]
    spaces += [(space, " ")] if space else []

    def bytes_of(token_id: int) -> bytes:
        if token_id in literal:
            return literal[token_id].encode()
        spelling = backend.id_to_token(token_id)
        if spelling is None:
            return b""
        if to_byte is not None and all(char in to_byte for char in spelling):
            return bytes(to_byte[char] for char in spelling)
        if "ByteFallback" in names and (match := _BYTE_TOKEN.fullmatch(spelling)):
            return bytes([int(match[1], 16)])
        for mark, text in spaces:
            spelling = spelling.replace(mark, text)
        return spelling.encode()

    return bytes_of


def _decoders(backend: tokenizers.Tokenizer) -> Iterator[dict[str, Any]]:
    """The steps of a tokenizer's decoder, as in tokenizer.json."""
    if backend.decoder is None:
        return
    state = json.loads(backend.decoder.__getstate__())
    yield from state["decoders"] if state["type"] == "Sequence" else [state]


def _is_replace(kind: dict[str, Any]) -> bool:
    return kind["type"] == "Replace" and "String" in kind["pattern"]
