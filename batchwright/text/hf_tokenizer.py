"""The tokenizer of a Hugging Face directory: tokenizer.json and the small files around it.

`tokenizer.json` is taken as it is: normaliser, pre-tokeniser, model, post-processor (which alone
decides about BOS and EOS) and decoder. Nothing is executed and `auto_map` is ignored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from batchwright.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from batchwright.text.backend import TokenizerParts

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_CONVERTIBLE = (
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tiktoken.model",
)
_MAX_TOKEN_ID = 2**31 - 1


def load_hf_tokenizer(directory: Path) -> TokenizerParts:
    """Read a directory's tokenizer.

    Raises:
        ModelNotFoundError: there is no tokenizer in the directory.
        UnsupportedModelError: there is one, but not as tokenizer.json.
        ModelFormatError: a file is damaged.
    """
    backend = _read_backend(directory)
    config = read_json_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_json_object(directory / "special_tokens_map.json")
    special_tokens = _special_tokens(config, directory)
    _add_missing_tokens(backend, directory, config, special_tokens)
    added = backend.get_added_tokens_decoder()
    eos = special_tokens.get("eos_token")
    eos_id = backend.token_to_id(eos) if eos is not None else None
    is_bpe = type(backend.model).__name__ == "BPE"
    return TokenizerParts(
        backend=backend,
        vocab_size=max(backend.get_vocab_size(), max(added, default=-1) + 1),
        special_tokens=special_tokens,
        end_token_ids=_end_token_ids(directory, eos_id),
        chat_templates=_chat_templates(directory, config),
        # As transformers: the clean-up was made for word pieces and harms BPE.
        clean_up_spaces=config.get("clean_up_tokenization_spaces") is True and not is_bpe,
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty one.

    Raises:
        ModelFormatError: not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: is a JSON {type(value).__name__}, must be an object")
    return value


def _read_backend(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        others = [name for name in _CONVERTIBLE if (directory / name).is_file()]
        if not others:
            raise ModelNotFoundError(
                f"{directory}: has no tokenizer.json; copy it there from the model's repository"
            )
        raise UnsupportedModelError(
            f"{directory}: has {', '.join(others)} but no tokenizer.json; write one with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelFormatError(f"{path}: not a usable tokenizer ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _token_text(value: Any) -> str | None:
    """A special token's text, which files give as a string or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(config: dict[str, Any], directory: Path) -> dict[str, str]:
    extra = config.get("extra_special_tokens")
    named = {name: config.get(name) for name in _NAMED}
    named |= {k: v for k, v in config.items() if k.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    texts = {name: _token_text(value) for name, value in named.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _add_missing_tokens(
    backend: tokenizers.Tokenizer,
    directory: Path,
    config: dict[str, Any],
    special_tokens: dict[str, str],
) -> None:
    """Add the tokens that only the small files name, in the order transformers adds them."""
    present = set(map(repr, backend.get_added_tokens_decoder().values()))
    tokens = _added_tokens(directory, config, special_tokens)
    missing = [token for token in tokens if repr(token) not in present]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known |= {token.content for token in missing}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    extra_texts = [_token_text(value) for value in extra] if isinstance(extra, list) else []
    for text in [*special_tokens.values(), *extra_texts]:
        if text and text not in known:
            known.add(text)
            missing.append(AddedToken(text, special=True, normalized=False))
    backend.add_tokens(missing)


def _added_tokens(
    directory: Path, config: dict[str, Any], special_tokens: dict[str, str]
) -> list[AddedToken]:
    decoder = config.get("added_tokens_decoder")
    try:
        if isinstance(decoder, dict):
            entries = sorted((int(i), fields) for i, fields in decoder.items())
            return [AddedToken(**_token_fields(fields)) for _, fields in entries]
        legacy = read_json_object(directory / "added_tokens.json")
        special = set(special_tokens.values())
        return [
            AddedToken(text, normalized=text not in special, special=text in special)
            for text, _ in sorted(legacy.items(), key=lambda item: int(item[1]))
        ]
    except (TypeError, ValueError, KeyError) as error:
        raise ModelFormatError(f"{directory}: the list of added tokens is bad: {error}") from error


def _token_fields(fields: dict[str, Any]) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"content": fields["content"]} | {k: fields[k] for k in flags if k in fields}


def _end_token_ids(directory: Path, eos_token_id: int | None) -> tuple[int, ...]:
    """Union of the tokenizer's EOS and the generation config's (else the model config's)."""
    path = directory / "generation_config.json"
    if not path.is_file():
        path = directory / "config.json"
    given = read_json_object(path).get("eos_token_id")
    ids = set(given if isinstance(given, list) else [] if given is None else [given])
    bad = [i for i in ids if type(i) is not int or not 0 <= i <= _MAX_TOKEN_ID]
    if bad:
        raise ModelFormatError(f"{path}: eos_token_id {bad[0]!r} is not a token id")
    return tuple(sorted(ids | ({eos_token_id} if eos_token_id is not None else set())))


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Every place a template may be, weakest first; a later one replaces the same name."""
    templates: dict[str, str] = {}
    legacy = read_json_object(directory / "chat_template.json").get("chat_template")
    for source in (legacy, config.get("chat_template")):
        if isinstance(source, str):
            templates["default"] = source
        elif isinstance(source, list):
            templates |= _named_templates(source, directory)
        elif isinstance(source, dict):
            templates |= {name: text for name, text in source.items() if isinstance(text, str)}
    files = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    paths = {path.name.removesuffix(".jinja"): path for path in files}
    if (directory / "chat_template.jinja").is_file():
        paths["default"] = directory / "chat_template.jinja"
    for name, path in paths.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except ValueError as error:
            raise ModelFormatError(f"{path}: not UTF-8 text ({error})") from error
    return templates


def _named_templates(entries: list[Any], directory: Path) -> dict[str, str]:
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in entries}
    except (TypeError, KeyError) as error:
        raise ModelFormatError(
            f"{directory / 'tokenizer_config.json'}: chat_template must be text or a list of "
            f"{{name, template}}; {error} is missing or wrong"
        ) from error
