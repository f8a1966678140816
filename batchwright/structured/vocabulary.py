"""A model's tokens as llguidance needs them, from any tokenizer of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llguidance

from batchwright.text.token_bytes import token_bytes
from batchwright.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Plain data, so that it can be sent to the worker process.

    Attributes:
        tokens: the bytes of every id; b"" for ids that must never be drawn.
        special_ids: ids that are no text, whatever their spelling.
        end_ids: ids that end an output; never empty, see `read_vocabulary`.
    """

    tokens: list[bytes]
    special_ids: list[int]
    end_ids: list[int]


def read_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """The vocabulary of a model whose logits have vocab_size columns.

    Ids of the tokenizer beyond that do not exist for the model. A model without an end token gets
    one that it cannot draw, at id vocab_size: llguidance wants one.
    """
    bytes_of = token_bytes(tokenizer.backend)
    tokens = [bytes_of(token_id) for token_id in range(vocab_size)]
    special_ids = sorted(i for i in tokenizer.special_token_ids if i < vocab_size)
    end_ids = [i for i in tokenizer.end_token_ids if i < vocab_size]
    if not end_ids:
        tokens.append(b"<end>")
        end_ids = [vocab_size]
    return Vocabulary(tokens, sorted({*special_ids, *end_ids}), end_ids)


class _Source:
    """What llguidance asks of a tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens: Sequence[bytes] = vocabulary.tokens
        self.special_token_ids: Sequence[int] = vocabulary.special_ids
        self.eos_token_id = vocabulary.end_ids[0]
        self.bos_token_id: int | None = None
        self._byte_ids = {token: i for i, token in enumerate(vocabulary.tokens) if len(token) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        """Any tokens that spell the text; masks do not depend on which."""
        data = text.encode() if isinstance(text, str) else text
        singles = (data[i : i + 1] for i in range(len(data)))
        return [self._byte_ids[byte] for byte in singles if byte in self._byte_ids]


def guidance_tokenizer(vocabulary: Vocabulary) -> llguidance.LLTokenizer:
    """llguidance's own form of a vocabulary; takes some 0.2 s for 49,152 tokens."""
    source = llguidance.TokenizerWrapper(_Source(vocabulary))
    return llguidance.LLTokenizer(source, eos_token=vocabulary.end_ids)
