"""Tokenizers from GGUF metadata, against transformers' conversion of the same files."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.text.byte_alphabet import BYTE_TO_CHAR
from batchwright.text.gguf_tokenizer import _PRE, _pre_tokenizer, gguf_tokenizer_parts
from batchwright.text.tokenizer import Tokenizer


def metadata_of(**changes: Any) -> dict[str, Any]:
    """A small byte-level tokenizer; keys of `changes` are below tokenizer.ggml, None removes."""
    letters = [BYTE_TO_CHAR[byte] for byte in range(256)]
    tokens = ["<|end|>", "<think>", *letters, "ab", "abc", "Ġa", "12", "ĊĊ"]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([3, 4] + [1] * (len(tokens) - 2), np.int32),
        "merges": ["a b", "ab c", "Ġ a", "1 2", "Ċ Ċ"],
        "eos_token_id": 0,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def tokenizer_of(**changes: Any) -> Tokenizer:
    return Tokenizer(gguf_tokenizer_parts(metadata_of(**changes)))


@pytest.mark.cpu
def test_smollm_ids_equal_transformers(
    smollm: Tokenizer, smollm_reference: Any, corpus: list[str]
) -> None:
    ours = smollm.encode_batch(corpus)
    for text, ids in zip(corpus, ours):
        assert ids == smollm_reference(text)["input_ids"], repr(text)
        for skip in (True, False):
            expected = smollm_reference.decode(ids, skip_special_tokens=skip)
            assert smollm.decode(ids, skip_special_tokens=skip) == expected
    assert smollm.vocab_size == len(smollm_reference) == 49152
    assert smollm.bos_token_id == smollm_reference.bos_token_id
    assert smollm.eos_token_id == smollm_reference.eos_token_id
    assert smollm.end_token_ids == (smollm_reference.eos_token_id,)
    assert smollm.special_tokens == smollm_reference.special_tokens_map


@pytest.mark.slow
@pytest.mark.cpu
def test_the_reference_is_what_transformers_loads(
    smollm_path: Path, smollm_reference: Any, corpus: list[str], digit_corpus: list[str]
) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(smollm_path.parent, gguf_file=smollm_path.name)
    for text in [*corpus, *digit_corpus, "<|im_start|>user\nhi<|im_end|>"]:
        assert loaded(text)["input_ids"] == smollm_reference(text)["input_ids"]
    assert loaded.special_tokens_map == smollm_reference.special_tokens_map
    assert loaded.chat_template == smollm_reference.chat_template
    assert len(loaded) == len(smollm_reference)


@pytest.mark.cpu
def test_smollm_cuts_digits_first(
    smollm: Tokenizer, smollm_reference: Any, corpus: list[str], digit_corpus: list[str]
) -> None:
    # The model was trained with every digit cut off before anything else (no token of its
    # vocabulary holds a digit and anything more), which transformers' conversion does not know.
    true = deepcopy(smollm_reference.backend_tokenizer)
    true.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    for text in corpus + digit_corpus:
        assert smollm.encode(text) == true.encode(text).ids, repr(text)
    for text in digit_corpus:  # if this fails, transformers learnt it and the note can go
        assert smollm.encode(text) != smollm_reference(text)["input_ids"], repr(text)


@pytest.mark.cpu
def test_smollm_parses_special_tokens_on_request(smollm: Tokenizer, smollm_reference: Any) -> None:
    text = "<|im_start|>user\nhi <|im_end|> <|endoftext|>x<jupyter_code>"
    assert smollm.encode(text, parse_special=True) == smollm_reference(text)["input_ids"]
    as_text = smollm_reference(text, split_special_tokens=True)["input_ids"]
    assert smollm.encode(text) == as_text
    assert smollm.special_token_ids.isdisjoint(as_text)
    assert smollm.decode(as_text) == text


@pytest.mark.cpu
@settings(max_examples=300)
@given(text=st.text(max_size=60))
def test_smollm_ids_equal_transformers_on_any_text(
    smollm: Tokenizer, smollm_reference: Any, text: str
) -> None:
    text = "".join(char for char in text if char.isascii() or not char.isnumeric())
    text = re.sub(r"\s+(?=\d)", " ", text)  # see test_smollm_cuts_digits_first
    assert smollm.encode(text) == smollm_reference(text)["input_ids"]


@settings(max_examples=200)
@given(
    text=st.text(
        st.characters(exclude_categories=("Cs", "Cn", "Cc", "Co")) | st.sampled_from(" \n\t09"),
        max_size=60,
    )
)
def test_smollm_round_trip(smollm: Tokenizer, text: str) -> None:
    # Excluded: characters with bytes that the vocabulary lacks (some controls, unassigned planes).
    assert smollm.decode(smollm.encode(text)) == text


@pytest.mark.cpu
def test_pre_tokenizers_equal_transformers(corpus: list[str], digit_corpus: list[str]) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    shared = sorted(set(_PRE) & set(mapping.GGUF_PRE_TOKENIZER_SPLITS))
    assert {"llama-bpe", "qwen2", "tekken", "gpt-4o"} <= set(shared)
    for name in shared:
        backend = Backend(models.BPE())
        reference = type("Reference", (), {"backend_tokenizer": backend})()
        mapping.set_split_regex(reference, {"pre_tokenizer_type": name})
        ours = _pre_tokenizer(_PRE[name])
        for text in corpus + digit_corpus:
            expected = backend.pre_tokenizer.pre_tokenize_str(text)
            assert ours.pre_tokenize_str(text) == expected, (name, text)


@pytest.mark.parametrize(
    "name, text, pieces",
    [
        ("gpt-2", "a\n\n12 it's", ["a", "Ċ", "Ċ", "12", "Ġit", "'s"]),
        ("smollm", "a\n\n12 it's", ["a", "ĊĊ", "1", "2", "Ġit", "'s"]),
        ("starcoder", "x  3", ["x", "ĠĠ", "3"]),
        ("llama-bpe", "1234 IT'S", ["123", "4", "ĠIT", "'S"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("tekken", "camelCase", ["camel", "Case"]),
    ],
)
def test_pre_tokenizers_cut_as_published(name: str, text: str, pieces: list[str]) -> None:
    cut = _pre_tokenizer(_PRE[name]).pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces


def test_byte_level_bpe_equals_the_tokenizer_it_was_made_from(corpus: list[str]) -> None:
    source = Backend(models.BPE())
    source.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    source.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    source.train_from_iterator(corpus * 2, trainer)
    vocab = sorted(source.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(source.to_str())["model"]["merges"]
    ours = tokenizer_of(
        tokens=[token for token, _ in vocab],
        token_type=None,
        merges=[" ".join(merge) for merge in merges],
        eos_token_id=None,
    )
    for text in corpus:
        assert ours.encode(text) == source.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_token_id is None and ours.end_token_ids == ()


def test_bos_and_eos_are_added_as_the_file_says() -> None:
    ends = {"bos_token_id": 2, "add_bos_token": True, "add_eos_token": True}
    tokenizer = tokenizer_of(**ends)
    assert tokenizer.encode("ab") == [2, 258, 0]
    assert tokenizer.encode("ab", add_special_tokens=False) == [258]
    assert tokenizer_of(bos_token_id=2).encode("ab") == [258]
    assert tokenizer_of(bos_token_id=2, pre="llama-bpe").encode("ab") == [2, 258]
    off = {"bos_token_id": 2, "pre": "llama-bpe", "add_bos_token": False}
    assert tokenizer_of(**off).encode("ab") == [258]


def test_user_defined_tokens_are_matched_and_not_special() -> None:
    tokenizer = tokenizer_of()
    assert tokenizer.encode("a<think>") == [2 + 97, 1]
    assert tokenizer.decode([1, 0]) == "<think>"
    assert tokenizer.special_token_ids == {0}


def test_control_tokens_outside_the_byte_alphabet_keep_their_ids() -> None:
    tokens = metadata_of()["tokenizer.ggml.tokens"]
    tokenizer = tokenizer_of(tokens=["<｜end｜>", *tokens[1:]])
    assert tokenizer.encode("ab<｜end｜>", parse_special=True) == [258, 0]
    assert tokenizer.vocab_size == len(tokens)


def test_end_tokens_are_all_that_the_file_names() -> None:
    assert tokenizer_of(eot_token_id=5, eom_token_id=4).end_token_ids == (0, 4, 5)
    assert tokenizer_of(eot_token_id=0xFFFFFFFF).end_token_ids == (0,)


def test_embedded_tokenizer_json_is_used(smollm: Tokenizer) -> None:
    source = Backend(models.WordLevel({"<|end|>": 0, "hello": 1, "[UNK]": 2}, unk_token="[UNK]"))
    source.pre_tokenizer = pre_tokenizers.Whitespace()
    metadata = metadata_of(model="other", tokens=["<|end|>", "hello", "[UNK]"], token_type=None)
    metadata["tokenizer.huggingface.json"] = source.to_str()
    assert Tokenizer(gguf_tokenizer_parts(metadata)).encode("hello you hello") == [1, 2, 1]
    metadata["tokenizer.huggingface.json"] = "{}"
    with pytest.raises(ModelFormatError, match=r"huggingface\.json"):
        gguf_tokenizer_parts(metadata)


def test_chat_templates_by_name() -> None:
    metadata = metadata_of()
    assert Tokenizer(gguf_tokenizer_parts(metadata)).chat_template is None
    metadata["tokenizer.chat_template"] = "one"
    assert Tokenizer(gguf_tokenizer_parts(metadata)).chat_template == "one"
    metadata["tokenizer.chat_template.tool_use"] = "two"
    both = Tokenizer(gguf_tokenizer_parts(metadata)).chat_template
    assert both == {"default": "one", "tool_use": "two"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": None}, "no tokenizer"),
        ({"tokens": []}, "no tokenizer"),
        ({"tokens": [1, 2]}, "no tokenizer"),
        ({"token_type": np.zeros(3, np.int32)}, "one per token"),
        ({"token_type": np.zeros((2, 2), np.int32)}, "one per token"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a"]}, "two tokens"),
        ({"merges": ["a b c"]}, "two tokens"),
        ({"merges": ["a zz"]}, "do not fit"),
        ({"merges": ["a a"]}, "do not fit"),
        ({"eos_token_id": 10**6}, "token id below"),
        ({"eos_token_id": -1}, "token id below"),
        ({"bos_token_id": "0"}, "token id below"),
        ({"pre": 7}, "must be str"),
        ({"model": "llama", "scores": None}, "scores"),
        ({"model": "llama", "scores": np.zeros(3, np.float32)}, "scores"),
    ],
)
def test_bad_metadata_is_a_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        tokenizer_of(**changes)


def test_overlong_pieces_are_refused() -> None:
    with pytest.raises(ModelFormatError, match="too long"):
        tokenizer_of(
            model="llama",
            tokens=["a" * 40_000],
            token_type=None,
            scores=np.zeros(1, np.float32),
        )


def test_unknown_kinds_name_what_is_supported() -> None:
    with pytest.raises(UnsupportedModelError, match=r"pre \"zebra\".*llama-bpe.*smollm"):
        tokenizer_of(pre="zebra")
    with pytest.raises(UnsupportedModelError, match=r"model \"bert\".*gpt2.*llama"):
        tokenizer_of(model="bert")
