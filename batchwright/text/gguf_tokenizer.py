"""The tokenizer that a GGUF file describes in its metadata.

`tokenizer.ggml.model` is "gpt2" (byte-level BPE, with merges, and a pre-tokenizer named by
`tokenizer.ggml.pre`) or "llama" (SentencePiece BPE: pieces with scores, see `spm_bpe`). A file that
carries a whole tokenizer.json (`tokenizer.huggingface.json`) is taken at that word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.text.backend import TokenizerParts
from batchwright.text.byte_alphabet import BYTE_TO_CHAR, CHAR_TO_BYTE
from batchwright.text.spm_bpe import spm_backend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

MAX_TOKENS = 1 << 22
_NAMED_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TEMPLATE_KEY = "tokenizer.chat_template"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED % ("", "") + r"|\p{N}" + _CASED_REST
_GPT4O = _CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_REST


class _Pre(NamedTuple):
    """How text is cut before BPE, and what else goes with a pre-tokenizer's name.

    Attributes:
        pattern: each match is a piece; None is GPT-2's own pattern.
        split_digits: every digit is a piece, before anything else.
        ignore_merges: a piece that is a token is taken whole.
        add_bos: whether BOS is added if the file does not say.
        nfc: text is normalised to NFC first.
    """

    pattern: str | None = None
    split_digits: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_GPT2 = _Pre()
_DIGITS = _Pre(split_digits=True)
_LLAMA3_PRE = _Pre(_LLAMA3, ignore_merges=True, add_bos=True)
_PRE: dict[str, _Pre] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "smaug-bpe": _Pre(_LLAMA3),
    "dbrx": _Pre(_LLAMA3),
    "qwen2": _Pre(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Pre(_QWEN2, nfc=True),
    "tekken": _Pre(_TEKKEN, ignore_merges=True, add_bos=True),
    "gpt-4o": _Pre(_GPT4O),
    "llama4": _Pre(_GPT4O),
}


def gguf_tokenizer_parts(metadata: Mapping[str, Any]) -> TokenizerParts:
    """Build the tokenizer from a GGUF file's metadata.

    Args:
        metadata: as `read_gguf` returns it.
    Raises:
        ModelFormatError: lengths or ids that do not fit each other.
        UnsupportedModelError: another tokenizer model or pre-tokenizer.
    """
    tokens, types = _vocabulary(metadata)
    kind = _get(metadata, "model", str, "")
    add_prefix = _get(metadata, "add_space_prefix", bool, True)
    pre = _Pre()
    embedded = metadata.get("tokenizer.huggingface.json")
    if isinstance(embedded, str):
        backend = _embedded_backend(embedded)
    elif kind == "gpt2":
        pre = _find_pre(_get(metadata, "pre", str, "default"))
        backend = _byte_level_backend(metadata, tokens, types, pre)
    elif kind == "llama":
        pre = _Pre(add_bos=True)
        backend = spm_backend(
            tokens,
            scores=_scores(metadata, len(tokens)),
            mergeable=(types == NORMAL) | (types == USER_DEFINED) | (types == UNUSED),
            byte_fallback=bool((types == BYTE).any()),
            unknown_id=_token_id(metadata, "unknown_token_id", len(tokens)),
            add_space_prefix=add_prefix,
        )
    else:
        raise UnsupportedModelError(
            f'unsupported: tokenizer.ggml.model "{kind}"; supported: gpt2 (byte-level BPE), llama '
            "(SentencePiece BPE), or any with tokenizer.huggingface.json"
        )
    _add_tokens(backend, tokens, types)
    _set_bos_eos(backend, metadata, len(tokens), pre.add_bos, embedded is not None)
    ids = {name: _token_id(metadata, key, len(tokens)) for name, key in _NAMED_IDS.items()}
    ends = {_token_id(metadata, key, len(tokens)) for key in _END_IDS}
    return TokenizerParts(
        backend=backend,
        vocab_size=len(tokens),
        special_tokens={name: tokens[i] for name, i in ids.items() if i is not None},
        end_token_ids=tuple(sorted(i for i in ends if i is not None)),
        chat_templates=_chat_templates(metadata),
        keep_leading_space=kind == "llama" and add_prefix and embedded is None,
    )


def _get(metadata: Mapping[str, Any], key: str, kind: type[Any], default: Any) -> Any:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, kind):
        raise ModelFormatError(
            f"tokenizer.ggml.{key} is {type(value).__name__}, must be {kind.__name__}"
        )
    return value


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], np.ndarray[Any, Any]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(type(t) is str for t in tokens):
        raise ModelFormatError(
            "tokenizer.ggml.tokens is missing or not a list of texts; the file has no tokenizer"
        )
    if len(tokens) > MAX_TOKENS:
        raise ModelFormatError(f"the file has {len(tokens)} tokens, the limit is {MAX_TOKENS}")
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return tokens, np.full(len(tokens), NORMAL, np.int32)
    types = np.asarray(types)
    if types.shape != (len(tokens),) or types.dtype.kind not in "iu":
        raise ModelFormatError(
            f"tokenizer.ggml.token_type has shape {types.shape} and type {types.dtype}, must be "
            f"{len(tokens)} integers, one per token"
        )
    return tokens, types


def _scores(metadata: Mapping[str, Any], num_tokens: int) -> np.ndarray[Any, Any]:
    scores = np.asarray(metadata.get("tokenizer.ggml.scores", ()))
    if scores.shape != (num_tokens,) or scores.dtype.kind != "f" or np.isnan(scores).any():
        raise ModelFormatError(
            f"tokenizer.ggml.scores has shape {scores.shape} and type {scores.dtype}, must be "
            f"{num_tokens} numbers, one per token"
        )
    return scores


def _token_id(metadata: Mapping[str, Any], key: str, num_tokens: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None or value == 0xFFFFFFFF:  # the largest uint32 is the format's "none"
        return None
    if type(value) is not int or not 0 <= value < num_tokens:
        raise ModelFormatError(
            f"tokenizer.ggml.{key} is {value!r}, must be a token id below {num_tokens}"
        )
    return value


def _find_pre(name: str) -> _Pre:
    if name not in _PRE:
        raise UnsupportedModelError(
            f'unsupported: tokenizer.ggml.pre "{name}"; supported: {", ".join(sorted(_PRE))}'
        )
    return _PRE[name]


def _byte_level_backend(
    metadata: Mapping[str, Any], tokens: list[str], types: np.ndarray[Any, Any], pre: _Pre
) -> tokenizers.Tokenizer:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelFormatError("tokenizer.ggml.merges is missing; byte-level BPE needs it")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        bad = next(merge for merge in merges if merge.count(" ") != 1)
        raise ModelFormatError(f"tokenizer.ggml.merges has {bad!r}, must be two tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if not CHAR_TO_BYTE.keys() >= set("".join(tokens)):
        _spell_in_bytes(vocab, tokens, types)
    try:
        model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise ModelFormatError(f"the file's merges do not fit its tokens: {error}") from error
    backend = tokenizers.Tokenizer(model)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _spell_in_bytes(vocab: dict[str, int], tokens: list[str], types: np.ndarray[Any, Any]) -> None:
    """Respell ordinary tokens that the writer of the file left as plain text."""
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and not CHAR_TO_BYTE.keys() >= set(token):
            vocab.pop(token, None)
            vocab.setdefault("".join(BYTE_TO_CHAR[byte] for byte in token.encode()), i)


def _pre_tokenizer(pre: _Pre) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None)
    if pre.pattern is not None:
        split = pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, byte_level])
    if pre.split_digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    return byte_level


def _embedded_backend(text: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelFormatError(f"tokenizer.huggingface.json is not usable: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: list[str], types: np.ndarray[Any, Any]
) -> None:
    """Have control and user-defined tokens matched whole, the former as special."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    chosen = np.flatnonzero((types == CONTROL) | (types == USER_DEFINED))
    added = [
        AddedToken(tokens[i], normalized=False, special=bool(types[i] == CONTROL))
        for i in chosen.tolist()
        # One that the model does not know would get a new id, beyond the model's embedding.
        if tokens[i] and tokens[i] not in known and backend.token_to_id(tokens[i]) is not None
    ]
    backend.add_tokens(added)


def _set_bos_eos(
    backend: tokenizers.Tokenizer,
    metadata: Mapping[str, Any],
    num_tokens: int,
    bos_by_default: bool,
    is_embedded: bool,
) -> None:
    flags = [metadata.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos")]
    if is_embedded and flags == [None, None]:
        return  # the embedded tokenizer.json has its own rule
    bos = _token_id(metadata, "bos_token_id", num_tokens)
    eos = _token_id(metadata, "eos_token_id", num_tokens)
    single, special_tokens = ["$A:0"], []
    if (bos_by_default if flags[0] is None else flags[0]) and bos is not None:
        single.insert(0, "BOS:0")
        special_tokens.append(("BOS", bos))
    if flags[1] and eos is not None:
        single.append("EOS:0")
        special_tokens.append(("EOS", eos))
    if special_tokens or is_embedded:
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special_tokens
        )


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    named = {
        key.removeprefix(_TEMPLATE_KEY).removeprefix("."): value
        for key, value in metadata.items()
        if (key == _TEMPLATE_KEY or key.startswith(_TEMPLATE_KEY + ".")) and isinstance(value, str)
    }
    return {name or "default": source for name, source in named.items()}
