"""SentencePiece vocabularies in GGUF form, against the sentencepiece library and transformers."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.text.gguf_tokenizer import gguf_tokenizer_parts
from batchwright.text.tokenizer import Tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore and the shells she sells are sea shells",
    "how much wood would a woodchuck chuck if a woodchuck could chuck wood",
    "Der schnelle braune Fuchs springt über den faulen Hund",
    "def f(x):  return x  + 1   # spaces",
    "numbers 1 22 333 4444 and 2024",
]


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no-prefix"])
def trained(request: pytest.FixtureRequest) -> Any:
    """A trained SentencePiece model, with or without the prefix space."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        control_symbols=["<|turn|>"],
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    processor.has_prefix = request.param
    return processor


def metadata_of(processor: Any) -> dict[str, Any]:
    size = processor.GetPieceSize()
    kinds = [
        (processor.IsUnknown, 2),
        (processor.IsControl, 3),
        (processor.IsUnused, 5),
        (processor.IsByte, 6),
    ]
    types = [next((n for check, n in kinds if check(i)), 1) for i in range(size)]
    types[processor.PieceToId("<tool>")] = 4
    values = {
        "model": "llama",
        "tokens": [processor.IdToPiece(i) for i in range(size)],
        "scores": np.array([processor.GetScore(i) for i in range(size)], np.float32),
        "token_type": np.array(types, np.int32),
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
        "add_space_prefix": processor.has_prefix,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.fixture(scope="module")
def tokenizer(trained: Any) -> Tokenizer:
    return Tokenizer(gguf_tokenizer_parts(metadata_of(trained)))


def test_ids_and_text_equal_sentencepiece(
    tokenizer: Tokenizer, trained: Any, corpus: list[str]
) -> None:
    for text in SENTENCES + corpus + ["call <tool> now", "  two", "x<|turn|>y</s>"]:
        expected = trained.EncodeAsIds(text)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if "\x00" not in text:  # sentencepiece stops at it
            assert ids == expected, repr(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("the")[0] == trained.bos_id()  # BOS unless the file says otherwise
    assert tokenizer.vocab_size == trained.GetPieceSize()


@settings(max_examples=300)
@given(text=st.text(st.sampled_from("thequickbrownfox sel  dü世😀\n1▁"), max_size=50))
def test_ids_equal_sentencepiece_on_any_text(tokenizer: Tokenizer, trained: Any, text: str) -> None:
    assert tokenizer.encode(text, add_special_tokens=False) == trained.EncodeAsIds(text)


def test_special_tokens_in_text_are_text(tokenizer: Tokenizer, trained: Any) -> None:
    text = "a<|turn|>b</s>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.special_token_ids.isdisjoint(ids) and tokenizer.decode(ids) == text
    parsed = tokenizer.encode(text, parse_special=True)
    assert trained.PieceToId("<|turn|>") in parsed and trained.eos_id() in parsed


@pytest.mark.cpu
@pytest.mark.parametrize("trained", [True], indirect=True)  # transformers always adds the prefix
def test_ids_equal_transformers(trained: Any, corpus: list[str]) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    metadata = metadata_of(trained)
    ours = Tokenizer(gguf_tokenizer_parts(metadata))
    keys = ("tokens", "scores", "token_type")
    described = {key: metadata[f"tokenizer.ggml.{key}"] for key in keys}
    described |= {"tokenizer_type": "llama", "scores": described["scores"].tolist()}
    described["token_type"] = described["token_type"].tolist()
    reference, _ = mapping.convert_gguf_tokenizer("llama", described)
    for text in SENTENCES + corpus:
        if text.startswith(" "):
            continue  # transformers adds no prefix space there; sentencepiece does, and so do we
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ids) == reference.decode(ids)
    template = "<|turn|>user the fox<|turn|> the dog</s>"
    expected = reference.encode(template, add_special_tokens=False).ids
    assert ours.encode(template, add_special_tokens=False, parse_special=True) == expected


def test_chat_segments_keep_their_prefix_rule(trained: Any) -> None:
    parts = gguf_tokenizer_parts(metadata_of(trained))
    source = "{% for m in messages %}<|turn|>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    tokenizer = Tokenizer(replace(parts, chat_templates={"default": source}))
    plain = [{"role": "user", "content": "the fox"}, {"role": "user", "content": "sea"}]
    text, ids = tokenizer.encode_chat(plain)
    assert ids == tokenizer.encode(text, add_special_tokens=False, parse_special=True)
    # The same messages by the careful path: only the spelled token's own ids differ.
    spelled = [plain[0], {"role": "user", "content": "sea</s>"}]
    text, ids = tokenizer.encode_chat(spelled)
    assert text == "<|turn|>user the fox</s><|turn|>user sea</s></s>"
    turn, eos = trained.PieceToId("<|turn|>"), trained.eos_id()
    assert [i for i in ids if i in (turn, eos)] == [turn, eos, turn, eos]
    _, unspelled_ids = tokenizer.encode_chat(plain)
    common = unspelled_ids.index(eos) + 1
    assert ids[:common] == unspelled_ids[:common]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_scores_decide_and_not_ids(trained: Any, corpus: list[str]) -> None:
    metadata = metadata_of(trained)
    order = np.random.default_rng(0).permutation(trained.GetPieceSize())  # new id -> old id
    new_ids = np.argsort(order)
    for key in ("tokens", "scores", "token_type"):
        values = metadata[f"tokenizer.ggml.{key}"]
        shuffled = [values[i] for i in order.tolist()]
        metadata[f"tokenizer.ggml.{key}"] = shuffled if key == "tokens" else np.array(shuffled)
    for key in ("bos", "eos", "unknown"):
        name = f"tokenizer.ggml.{key}_token_id"
        metadata[name] = int(new_ids[metadata[name]])
    tokenizer = Tokenizer(gguf_tokenizer_parts(metadata))
    for text in SENTENCES + corpus:
        if "\x00" not in text:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert order[ids].tolist() == trained.EncodeAsIds(text), repr(text)


def test_text_never_merges_into_a_control_token() -> None:
    tokens = ["<unk>", "<s>", "<", "s", ">", "<s", "s>", "ss"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.arange(len(tokens), dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3] + [1] * 6, np.int32),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = Tokenizer(gguf_tokenizer_parts(metadata))
    assert tokenizer.encode("<s>") == [2, 6]
    assert tokenizer.encode("<s>", parse_special=True) == [1]
    assert tokenizer.encode("<ss>s!") == [2, 7, 4, 3, 0]
