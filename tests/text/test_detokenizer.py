"""Incremental text equals decoding all at once; stop strings are found across token borders."""

import io
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from batchwright.request import SamplingParams
from batchwright.text.backend import TokenizerParts
from batchwright.text.detokenizer import StopMatch, StopStringChecker
from batchwright.text.text_stream import WindowStream, open_text_stream
from batchwright.text.tokenizer import Tokenizer


def parts_of(backend: Backend) -> TokenizerParts:
    return TokenizerParts(
        backend=backend,
        vocab_size=backend.get_vocab_size(),
        special_tokens={},
        end_token_ids=(),
    )


def byte_fallback(*, strip: bool) -> Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["</s>", "▁", "a", "▁the", "é", "▁▁", "end", "st", "op", "世", "\n", "<0xZZ>"]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    backend.add_tokens([AddedToken("</s>", special=True, normalized=False)])
    return Tokenizer(parts_of(backend))


def word_piece() -> Tokenizer:
    pieces = ["[UNK]", "stop", "##ping", "the", "##s", ".", "car", "[SEP]"]
    backend = Backend(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    return Tokenizer(parts_of(backend))


@pytest.fixture(scope="module")
def tokenizers(smollm: Tokenizer) -> dict[str, Tokenizer]:
    return {
        "smollm": smollm,
        "byte fallback": byte_fallback(strip=True),
        "byte fallback, no strip": byte_fallback(strip=False),
        "word piece": word_piece(),
    }


NAMES = ["smollm", "byte fallback", "byte fallback, no strip", "word piece"]


def stream_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    stream = open_text_stream(tokenizer, skip_special_tokens=skip)
    text = ""
    for token_id in ids:
        num_replaced, new = stream.push(token_id)
        assert num_replaced <= len(text)
        text = text[: len(text) - num_replaced] + new
    num_replaced, new = stream.flush()
    return text[: len(text) - num_replaced] + new


def settled_checks(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Text that a stream calls settled never changes again."""
    stream = open_text_stream(tokenizer)
    text = settled = ""
    for token_id in ids:
        num_replaced, new = stream.push(token_id)
        text = text[: len(text) - num_replaced] + new
        assert text.startswith(settled)
        if not stream.is_open:
            settled = text


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(data=st.data(), skip=st.booleans())
def test_stream_equals_decode(
    name: str, data: st.DataObject, skip: bool, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))
    text = tokenizer.decode(ids, skip_special_tokens=skip)
    assert stream_text(tokenizer, ids, skip) == text
    settled_checks(tokenizer, ids)


@settings(max_examples=150)
@given(data=st.data(), text=st.text(max_size=12))
def test_stream_equals_decode_of_torn_characters(
    data: st.DataObject, text: str, tokenizers: dict[str, Tokenizer]
) -> None:
    # Single bytes, valid characters and broken ones side by side.
    raw = list(text.encode()) + data.draw(st.lists(st.integers(0, 255), max_size=6))
    at = data.draw(st.integers(0, len(raw)))
    fallback = tokenizers["byte fallback"]
    ids = [*raw[:at], *data.draw(st.lists(st.integers(256, 267), max_size=3)), *raw[at:]]
    assert stream_text(fallback, ids, True) == fallback.decode(ids)
    settled_checks(fallback, ids)
    smollm = tokenizers["smollm"]
    ids = smollm.encode(text)[:-1] + smollm.encode(bytes(raw).decode("utf-8", "replace"))[1:]
    assert stream_text(smollm, ids, True) == smollm.decode(ids)


def expected_match(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> Any:
    """By the definition: decode after every token, and look for what min_tokens lets count."""
    ignored = len(tokenizer.decode(ids[: params.min_tokens]).rstrip("\ufffd"))
    for num_tokens in range(params.min_tokens + 1, len(ids) + 1):
        text = tokenizer.decode(ids[:num_tokens])
        ends = [
            (start + len(stop), start, stop)
            for stop in params.stop
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > ignored
        ]
        if ends:
            _, start, stop = min(ends)
            return StopMatch(stop, text[:start], num_tokens)
    return None


@settings(max_examples=300)
@given(data=st.data())
def test_stop_strings_by_definition(data: st.DataObject, smollm: Tokenizer) -> None:
    text = data.draw(st.text(st.sampled_from("ab \nñ世😀.S<"), min_size=1, max_size=30))
    ids = smollm.encode(text)
    if data.draw(st.booleans()):  # one token per character or byte, or the usual ones
        ids = [i for char in text for i in smollm.encode(char)]
    cut = st.integers(0, len(text) - 1)
    stops = [
        text[start : start + data.draw(st.integers(1, 6))]
        for start in data.draw(st.lists(cut, min_size=1, max_size=3))
    ]
    stops = [*stops, "never"]
    params = SamplingParams(stop=tuple(stops), min_tokens=data.draw(st.integers(0, 4)))
    checker = StopStringChecker(smollm, params)
    match = None
    position = 0
    while match is None and position < len(ids):
        step = data.draw(st.integers(1, 3))
        match = checker.append(ids[position : position + step])
        position += step
    assert match == expected_match(smollm, ids, params)
    assert match is not None or params.min_tokens  # every stop is a piece of the text


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_token_borders(include: bool, smollm: Tokenizer) -> None:
    ids = smollm.encode("Q: one\nA: two\n\nQ: three")
    params = SamplingParams(stop=("\n\nQ:",), include_stop_str_in_output=include)
    checker = StopStringChecker(smollm, params)
    matches = [checker.append([token_id]) for token_id in ids[:-1]]
    match = next(match for match in matches if match)
    assert match.text == "Q: one\nA: two" + ("\n\nQ:" if include else "")
    assert match.stop == "\n\nQ:"
    assert smollm.decode(ids[: match.num_tokens]).endswith("\n\nQ:")


def test_stop_string_of_split_characters(smollm: Tokenizer) -> None:
    ids = smollm.encode("ok 🏴 end")
    assert any("\ufffd" in smollm.decode([token_id]) for token_id in ids)
    checker = StopStringChecker(smollm, SamplingParams(stop=("🏴",)))
    num_tokens = next(n for n in range(len(ids)) if "🏴" in smollm.decode(ids[:n]))
    assert checker.append(ids) == ("🏴", "ok ", num_tokens)
    unfinished = StopStringChecker(smollm, SamplingParams(stop=("\ufffd",)))
    assert all(unfinished.append([token_id]) is None for token_id in ids)


def test_completed_first_wins_and_then_the_longest(smollm: Tokenizer) -> None:
    def match(text: str, *stops: str) -> StopMatch | None:
        return StopStringChecker(smollm, SamplingParams(stop=stops)).append(smollm.encode(text))

    assert match("xabcd", "abcd", "bc")[:2] == ("bc", "xa")  # type: ignore[index]
    assert match("xabc", "bc", "abc")[:2] == ("abc", "x")  # type: ignore[index]
    assert match("xabc", "", "nope") is None
    assert match("", "a") is None


def test_min_tokens_skips_early_stops(smollm: Tokenizer) -> None:
    ids = smollm.encode("a. b. c. d.")
    assert len(ids) == 8
    for min_tokens, text in [(0, "a"), (1, "a"), (2, "a. b"), (3, "a. b"), (4, "a. b. c")]:
        params = SamplingParams(stop=(".",), min_tokens=min_tokens)
        match = StopStringChecker(smollm, params).append(ids)
        assert match is not None and match.text == text, min_tokens
    params = SamplingParams(stop=(".",), min_tokens=8)
    assert StopStringChecker(smollm, params).append(ids) is None


def test_special_tokens_match_only_if_they_are_shown(smollm: Tokenizer) -> None:
    ids = [*smollm.encode("hi"), 2, *smollm.encode("<")]
    hidden = SamplingParams(stop=("<|im_end|>",))
    assert StopStringChecker(smollm, hidden).append(ids) is None
    shown = SamplingParams(stop=("<|im_end|>",), skip_special_tokens=False)
    assert StopStringChecker(smollm, shown).append(ids) == ("<|im_end|>", "hi", 2)


def test_a_run_of_bytes_that_turns_out_broken(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte fallback"]
    good = list("né!".encode())
    params = SamplingParams(stop=("é!",))
    assert StopStringChecker(tokenizer, params).append(good) == ("é!", "n", 4)
    # A broken byte before it: the whole run is replacement characters, so nothing matches.
    assert StopStringChecker(tokenizer, params).append([0xFF, *good]) is None
    broken = SamplingParams(stop=("a\ufffd\ufffd",))
    a = tokenizer.backend.token_to_id("a")
    match = StopStringChecker(tokenizer, broken).append([a, ord("x"), 0xFF, a])
    assert match == ("a\ufffd\ufffd", "", 3)


def test_other_decoders_find_stops_too(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["word piece"]
    assert isinstance(open_text_stream(tokenizer), WindowStream)
    ids = [3, 6, 4, 7, 1, 2, 5]
    assert tokenizer.decode(ids) == "the cars stopping."
    match = StopStringChecker(tokenizer, SamplingParams(stop=("s stop",))).append(ids)
    assert match == ("s stop", "the car", 5)


@pytest.mark.parametrize("name", ["smollm", "byte fallback"])
def test_cost_per_token_does_not_grow(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[name]
    # For byte fallback, one unsettled run of bytes all along: the worst case.
    ids = tokenizer.encode("no such thing here, ") if name == "smollm" else list(b"abcdefgh")
    params = SamplingParams(stop=("never seen", "neither"))

    def seconds_per_token(num_repeats: int) -> float:
        best = float("inf")
        for _ in range(3):
            checker = StopStringChecker(tokenizer, params)
            start = time.process_time()
            assert checker.append(ids * num_repeats) is None
            best = min(best, time.process_time() - start)
        return best / (num_repeats * len(ids))

    assert seconds_per_token(4000) < 4 * seconds_per_token(200)


def test_sentencepiece_stream(corpus: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from batchwright.text.gguf_tokenizer import gguf_tokenizer_parts

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus[2:8] * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = processor.GetPieceSize()
    types = [3 if processor.IsControl(i) else 6 if processor.IsByte(i) else 1 for i in range(size)]
    values = {
        "model": "llama",
        "tokens": [processor.IdToPiece(i) for i in range(size)],
        "scores": np.array([processor.GetScore(i) for i in range(size)], np.float32),
        "token_type": np.array(types, np.int32),
        "unknown_token_id": 0,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    tokenizer = Tokenizer(gguf_tokenizer_parts(metadata))
    assert tokenizer.decoder_kind == "byte_fallback_strip"
    for text in corpus:
        ids = tokenizer.encode(text)
        assert stream_text(tokenizer, ids, True) == tokenizer.decode(ids) == text
        if len(text) > 8:
            params = SamplingParams(stop=(text[4:8],))
            match = StopStringChecker(tokenizer, params).append(ids)
            assert match is not None and match.text == text[: text.index(text[4:8])]
