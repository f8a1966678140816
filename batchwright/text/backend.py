"""What the loaders of Hugging Face directories and GGUF files hand to `Tokenizer`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """A `tokenizers` pipeline and the facts around it that the pipeline itself does not hold.

    Attributes:
        backend: parses special tokens in text, adds BOS and EOS when asked to.
        vocab_size: one more than the largest token id.
        special_tokens: `bos_token`, `eos_token`, ... -> text, as chat templates read them.
        end_token_ids: ids that end an output.
        chat_templates: name -> source; "default" is the usual one.
        keep_leading_space: a text that starts with a space gets the prefix space too, as
            SentencePiece does (the `tokenizers` pipeline would take the text's space for it).
        clean_up_spaces: decoded text loses spaces before punctuation (word-piece models).
    """

    backend: tokenizers.Tokenizer
    vocab_size: int
    special_tokens: dict[str, str]
    end_token_ids: tuple[int, ...]
    chat_templates: dict[str, str] = field(default_factory=dict)
    keep_leading_space: bool = False
    clean_up_spaces: bool = False


def text_only_backend(
    backend: tokenizers.Tokenizer, special: frozenset[str]
) -> tokenizers.Tokenizer:
    """Copy a pipeline, sharing its model, into one for which special tokens in text are text.

    Args:
        backend: the pipeline to copy.
        special: spellings that count as special besides those the pipeline marks so.
    """
    added = backend.get_added_tokens_decoder()
    copy = tokenizers.Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        component = getattr(backend, name)
        if component is not None:
            setattr(copy, name, component)
    copy.add_tokens([_as_special(added[i], special) for i in sorted(added)])
    if sorted(copy.get_added_tokens_decoder()) != sorted(added):
        copy = tokenizers.Tokenizer.from_str(backend.to_str())  # ids with gaps: copy it whole
        copy.add_tokens([_as_special(added[i], special) for i in sorted(added)])
    copy.encode_special_tokens = True
    return copy


def _as_special(token: AddedToken, special: frozenset[str]) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special or token.content in special,
    )


def decoder_kind(decoder: Any) -> str:
    """Name the kind of a `tokenizers` decoder: which stream of `text_stream` follows it exactly.

    "byte_level", "byte_fallback", "byte_fallback_strip" (drops one space at the start of the text),
    or "window" for any other.
    """
    if decoder is None:
        return "window"
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return "byte_level"
    space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    if names[:3] != ["Replace", "ByteFallback", "Fuse"] or steps[0] != space:
        return "window"
    if names[3:] == []:
        return "byte_fallback"
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return "byte_fallback_strip" if steps[3:] == [strip] else "window"
