"""Token ids in, text out, one token at a time: the same text that decoding all ids at once gives.

Two families of decoders are followed exactly. Byte-level BPE joins the bytes of all tokens and
replaces invalid UTF-8. SentencePiece with byte fallback joins pieces, and a run of byte pieces is
either valid UTF-8 as a whole or one replacement character per byte. Any other decoder is called on
a window of the last tokens.
"""

from __future__ import annotations

import codecs
import re
from typing import Protocol

from batchwright.text.byte_alphabet import CHAR_TO_BYTE
from batchwright.text.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9a-fA-F]{2})>")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_MAX_HELD_TOKENS = 8  # longest wait for the rest of a character: 4 bytes, some tokens hold none


class TextStream(Protocol):
    """One sequence's text, as it grows."""

    @property
    def is_open(self) -> bool:
        """Whether text given since the last time this was false may still be replaced."""
        ...

    def push(self, token_id: int) -> tuple[int, str]:
        """Take a token: the last n characters given so far are replaced by the text returned."""
        ...

    def flush(self) -> tuple[int, str]:
        """The sequence is over: the same for what was held back (an unfinished character)."""
        ...


def open_text_stream(
    tokenizer: Tokenizer, *, skip_special_tokens: bool = True, keep: frozenset[int] = frozenset()
) -> TextStream:
    """Start a stream of the kind that the tokenizer's decoder needs; see `Tokenizer.decode`."""
    skipped = tokenizer.special_token_ids - keep if skip_special_tokens else frozenset()
    kind = tokenizer.decoder_kind
    if kind == "byte_level":
        return ByteLevelStream(tokenizer, skipped)
    if kind in ("byte_fallback", "byte_fallback_strip"):
        return ByteFallbackStream(tokenizer, skipped, strip=kind == "byte_fallback_strip")
    return WindowStream(tokenizer, skip_special_tokens, keep)


class ByteLevelStream:
    """Byte-level BPE. Never replaces text."""

    is_open = False

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> tuple[int, str]:
        if token_id in self._skipped:
            return 0, ""
        token = self._tokenizer.id_to_token(token_id)
        return 0, self._utf8.decode(_token_bytes(token)) if token else ""

    def flush(self) -> tuple[int, str]:
        return 0, self._utf8.decode(b"", final=True)


def _token_bytes(token: str) -> bytes:
    try:
        return bytes([CHAR_TO_BYTE[char] for char in token])
    except KeyError:  # an added token, spelled as it reads
        return token.encode()


class ByteFallbackStream:
    """SentencePiece pieces. Text of a run of byte pieces may be replaced until the run ends.

    Args:
        strip: one space at the very start of the text is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], *, strip: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._strip_next = strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._num_run_bytes = 0
        self._num_run_chars = 0  # characters given for the run
        self._run_is_valid = True

    @property
    def is_open(self) -> bool:
        return self._num_run_bytes > 0

    def push(self, token_id: int) -> tuple[int, str]:
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            return 0, ""
        byte = _BYTE_PIECE.fullmatch(token)
        if byte:
            return self._push_byte(int(byte[1], 16))
        num_replaced, before = self._end_run()
        return num_replaced, before + self._stripped(token.replace("\u2581", " "))

    def flush(self) -> tuple[int, str]:
        return self._end_run()

    def _push_byte(self, byte: int) -> tuple[int, str]:
        self._num_run_bytes += 1
        if not self._run_is_valid:
            self._num_run_chars += 1
            return 0, _UNKNOWN
        try:
            text = self._stripped(self._utf8.decode(bytes([byte])))
        except UnicodeDecodeError:
            return self._spoil_run()
        self._num_run_chars += len(text)
        return 0, text

    def _spoil_run(self) -> tuple[int, str]:
        """The run is not UTF-8: every byte of it becomes a replacement character."""
        self._run_is_valid = False
        self._strip_next = False  # if the run is at the start, no space is there any more
        num_replaced, self._num_run_chars = self._num_run_chars, self._num_run_bytes
        return num_replaced, _UNKNOWN * self._num_run_bytes

    def _end_run(self) -> tuple[int, str]:
        is_cut = self._run_is_valid and self._utf8.getstate()[0] != b""
        given = self._spoil_run() if is_cut else (0, "")
        self._utf8.reset()
        self._num_run_bytes = self._num_run_chars = 0
        self._run_is_valid = True
        return given

    def _stripped(self, text: str) -> str:
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text


class WindowStream:
    """Any other decoder: the text that a token adds to the decoded last few tokens.

    Exact where a token's text depends on its neighbours alone, as in word-piece decoders; a match
    is checked against the full text by `StopStringChecker`.
    """

    is_open = False

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, keep: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._keep = keep
        self._ids: list[int] = []
        self._num_given = 0  # of `_ids`, whose text was given

    def push(self, token_id: int) -> tuple[int, str]:
        self._ids.append(token_id)
        return self._give(force=len(self._ids) - self._num_given > _MAX_HELD_TOKENS)

    def flush(self) -> tuple[int, str]:
        return self._give(force=True)

    def _give(self, *, force: bool) -> tuple[int, str]:
        before = self._decode(self._ids[: self._num_given])
        after = self._decode(self._ids)
        if after.endswith(_UNKNOWN) and not force:
            return 0, ""
        if after != before:  # keep the last tokens that made text, as context for the next
            del self._ids[: self._num_given]
        else:
            del self._ids[self._num_given :]
        self._num_given = len(self._ids)
        return 0, after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special, keep=self._keep)
