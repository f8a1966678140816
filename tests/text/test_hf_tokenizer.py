"""Tokenizers of Hugging Face directories, against transformers' AutoTokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from batchwright.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from batchwright.text.tokenizer import Tokenizer, load_tokenizer


def byte_level(corpus: list[str], *, with_bos: bool = False) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(corpus * 2, trainer)
    backend.add_tokens(
        ["<tool>", AddedToken("<mask>", special=True, lstrip=True, normalized=False)]
    )
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return backend


def metaspace(corpus: list[str]) -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    backend.train_from_iterator([" ".join(corpus[:6])], trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in bytes_]
    return Backend.from_str(json.dumps(state))


def word_piece(corpus: list[str]) -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def write(directory: Path, backend: Backend | None, **files: Any) -> Path:
    """Write a model directory; files are named with underscores for dots, values are JSON."""
    if backend is not None:
        backend.save(str(directory / "tokenizer.json"))
    for name, value in files.items():
        path = directory / (name + ".json")
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return directory


def reference_of(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory)


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "byte-level": (byte_level, {"tokenizer_config": FAST}),
    "bos and eos": (
        lambda corpus: byte_level(corpus, with_bos=True),
        # With a tokenizer.json these flags change nothing.
        {"tokenizer_config": FAST | {"add_bos_token": False, "add_eos_token": False}},
    ),
    "special tokens map": (
        byte_level,
        {
            "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
            "special_tokens_map": {"eos_token": {"content": "</s>"}, "bos_token": "<s>"},
        },
    ),
    "new special tokens": (
        byte_level,
        {
            "tokenizer_config": FAST
            | {
                "pad_token": "<pad>",
                "additional_special_tokens": ["<x>", "<tool>"],
                "image_token": "<image>",
            }
        },
    ),
    "added tokens decoder": (
        byte_level,
        {
            "tokenizer_config": FAST
            | {
                "added_tokens_decoder": {
                    "0": {"content": "<s>", "special": True, "normalized": False},
                    "1": {"content": "</s>", "special": True, "normalized": False},
                    "602": {"content": "<extra>", "special": False, "normalized": False},
                    "603": {"content": "<more>", "special": True, "rstrip": True},
                }
            }
        },
    ),
    "added_tokens.json": (
        byte_level,
        {"tokenizer_config": FAST, "added_tokens": {"<later>": 603, "<sooner>": 602}},
    ),
    "metaspace": (metaspace, {"tokenizer_config": FAST | {"unk_token": "<unk>"}}),
    "word pieces": (
        word_piece,
        {"tokenizer_config": FAST | {"clean_up_tokenization_spaces": True}},
    ),
    "clean-up of BPE is ignored": (
        byte_level,
        {"tokenizer_config": FAST | {"clean_up_tokenization_spaces": True}},
    ),
}


@pytest.mark.cpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")  # transformers warns about some of these files
def test_ids_and_text_equal_transformers(
    case: str, tmp_path: Path, corpus: list[str], digit_corpus: list[str]
) -> None:
    make, files = CASES[case]
    directory = write(tmp_path, make(corpus), **files)
    ours, reference = load_tokenizer(directory), reference_of(directory)
    specials = "a <s>b</s> <tool> x <mask> <pad><x><image> <extra> <more> y <later><sooner> it 's"
    for text in [*corpus, *digit_corpus, specials]:
        for add in (True, False):
            expected = reference(text, add_special_tokens=add)["input_ids"]
            ids = ours.encode(text, add_special_tokens=add, parse_special=True)
            assert ids == expected, repr(text)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(
                    ids, skip_special_tokens=skip
                )
        as_text = reference(text, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == as_text
    assert ours.vocab_size == len(reference)
    assert (ours.bos_token_id, ours.eos_token_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
    )
    assert ours.special_tokens == reference.special_tokens_map
    assert ours.encode_batch(corpus) == [ours.encode(text) for text in corpus]


@pytest.mark.cpu
def test_what_transformers_saves_is_read_back(
    smollm: Tokenizer, smollm_reference: Any, tmp_path: Path, corpus: list[str]
) -> None:
    smollm_reference.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.encode_batch(corpus) == smollm.encode_batch(corpus)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.encode_chat(messages) == smollm.encode_chat(messages)
    assert ours.end_token_ids == smollm.end_token_ids
    assert ours.special_token_ids == smollm.special_token_ids


def test_baked_in_truncation_and_padding_are_off(tmp_path: Path, corpus: list[str]) -> None:
    backend = byte_level(corpus)
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    tokenizer = load_tokenizer(write(tmp_path, backend, tokenizer_config=FAST))
    text = "a long enough text"
    for parse in (False, True):
        assert tokenizer.decode(tokenizer.encode(text, parse_special=parse)) == text
    assert tokenizer.encode("a") == [backend.token_to_id("a")]


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        (None, None, (1,)),
        ({"eos_token_id": 7}, None, (1, 7)),
        ({"eos_token_id": [7, 1, 9]}, {"eos_token_id": 3}, (1, 7, 9)),
        ({}, {"eos_token_id": 3}, (1,)),
        (None, {"eos_token_id": 3}, (1, 3)),
        (None, {"eos_token_id": None}, (1,)),
    ],
)
def test_end_tokens_are_a_union(
    generation: Any, config: Any, expected: tuple[int, ...], tmp_path: Path, corpus: list[str]
) -> None:
    files = {"tokenizer_config": FAST, "generation_config": generation, "config": config}
    present = {name: value for name, value in files.items() if value is not None}
    directory = write(tmp_path, byte_level(corpus), **present)
    assert load_tokenizer(directory).end_token_ids == expected


def test_templates_are_found_in_every_place(tmp_path: Path, corpus: list[str]) -> None:
    write(tmp_path, byte_level(corpus), tokenizer_config=FAST)
    assert load_tokenizer(tmp_path).chat_template is None
    write(tmp_path, None, chat_template={"chat_template": "legacy"})
    assert load_tokenizer(tmp_path).chat_template == "legacy"
    write(tmp_path, None, tokenizer_config=FAST | {"chat_template": "config"})
    assert load_tokenizer(tmp_path).chat_template == "config"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write(tmp_path, None, tokenizer_config=FAST | {"chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == {"default": "D", "tool_use": "T"}
    (tmp_path / "chat_template.jinja").write_text("file\n")
    assert load_tokenizer(tmp_path).chat_template == {"default": "file\n", "tool_use": "T"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    expected = {"default": "file\n", "tool_use": "T", "rag": "R"}
    assert load_tokenizer(tmp_path).chat_template == expected


def test_absent_tokenizers_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model.*save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer": "{"}, "tokenizer.json: not a usable"),
        ({"tokenizer": "[]"}, "tokenizer.json: not a usable"),
        ({"tokenizer": {"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}}, "usable"),
        ({"tokenizer_config": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config": [1]}, "must be an object"),
        ({"tokenizer_config": {"chat_template": [{"name": "x"}]}}, "chat_template"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "added tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {"content": 5}}}}, "added tokens"),
        ({"generation_config": {"eos_token_id": "2"}}, "'2' is not a token id"),
        ({"generation_config": {"eos_token_id": [-1]}}, "-1 is not a token id"),
    ],
)
def test_damaged_files_are_clear_errors(
    files: dict[str, Any], message: str, tmp_path: Path, corpus: list[str]
) -> None:
    write(tmp_path, byte_level(corpus[:3]), **files)
    with pytest.raises(ModelFormatError, match=message):
        load_tokenizer(tmp_path)
