"""Bytes of single tokens: joined, they are the text's bytes."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from batchwright.text.token_bytes import token_bytes

TEXT = "Grüße, 世界! 🚉\n  two spaces\tand\u00a0more <|end|>"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(["Größe"])
    return tokenizer


def sentence_piece(last: str) -> Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "▁two", "nd"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=None)
    tokenizer = Tokenizer(model)
    steps = {
        "replace": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
        "metaspace": [decoders.ByteFallback(), decoders.Metaspace()],
    }[last]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def test_byte_level_tokens_join_to_the_text() -> None:
    tokenizer = byte_level()
    text = TEXT + "€ж"  # in no training text: these are spelled byte by byte
    ids = tokenizer.encode(text).ids
    bytes_of = token_bytes(tokenizer)
    assert b"".join(map(bytes_of, ids)) == text.encode()
    assert any(len(bytes_of(token_id)) > 2 for token_id in ids)
    assert "\ufffd" in "".join(tokenizer.decode([token_id]) for token_id in ids)  # why this exists


def test_every_byte_has_a_token() -> None:
    tokenizer = byte_level()
    bytes_of = token_bytes(tokenizer)
    found = {bytes_of(token_id) for token_id in range(tokenizer.get_vocab_size())}
    assert {bytes([byte]) for byte in range(256)} <= found


def test_added_tokens_are_spelled_as_they_are() -> None:
    tokenizer = byte_level()
    bytes_of = token_bytes(tokenizer)
    assert bytes_of(tokenizer.token_to_id("<|end|>")) == b"<|end|>"
    assert bytes_of(tokenizer.token_to_id("Größe")) == "Größe".encode()


@pytest.mark.parametrize("last", ["replace", "metaspace"])
def test_sentence_piece_tokens(last: str) -> None:
    tokenizer = sentence_piece(last)
    bytes_of = token_bytes(tokenizer)
    pieces = ["▁two", "▁", "a", "nd", "<0xE2>", "<0x0A>"]
    found = [bytes_of(tokenizer.token_to_id(piece)) for piece in pieces]
    assert found == [b" two", b" ", b"a", b"nd", b"\xe2", b"\n"]


def test_an_id_without_a_token_has_no_bytes() -> None:
    assert token_bytes(byte_level())(10**6) == b""
    assert token_bytes(Tokenizer(models.BPE()))(0) == b""
