"""Special tokens that are spelled in user text: finding them, and marking them through a template.

A chat template mixes its own special tokens with text a user wrote. To tell the two apart, every
character of a user's spelling of a special token is replaced, one for one, by a private-use
character that occurs nowhere else; the template is rendered with the marked strings too, and
wherever the marks come out is user text. Spellings that only begin or end in a user's string are
marked as well, since template text or a neighbouring string could complete them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

_MARKS = range(0xF0000, 0xFFFFE)  # supplementary private-use area A


class SpecialSpellings:
    """The spellings of a tokenizer's special tokens.

    Args:
        contents: what each special token looks like in text.
    """

    def __init__(self, contents: Collection[str]) -> None:
        longest_first = sorted(filter(None, contents), key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # A spelling that begins (ends) with a letter or digit is found only whole: half of it is
        # an ordinary word, and marking the word "system" would mislead every template.
        self._starts = frozenset(
            text[:n] for text in longest_first if not text[0].isalnum() for n in range(1, len(text))
        )
        self._ends = frozenset(
            text[n:]
            for text in longest_first
            if not text[-1].isalnum()
            for n in range(1, len(text))
        )
        self._max_part = max(map(len, longest_first), default=1) - 1

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Ranges [start, end) of text that spell a special token, wholly or at an end of text."""
        spans = [match.span() for match in self.pattern.finditer(text)]
        longest = min(self._max_part, len(text))
        for n in range(longest, 0, -1):
            if text[-n:] in self._starts:
                spans.append((len(text) - n, len(text)))
                break
        for n in range(longest, 0, -1):
            if text[:n] in self._ends:
                spans.append((0, n))
                break
        return spans

    def touches(self, value: Any) -> bool:
        """Whether any string inside a JSON-like value has such a range."""
        return any(self.spans(text) for text in strings_in(value))


def strings_in(value: Any) -> Iterator[str]:
    """Every string inside a JSON-like value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


class Marking:
    """A one-to-one replacement of the characters of special tokens by private-use ones.

    Args:
        spellings: what to mark.
        taken: characters that occur in any text of this row and must not be used as marks.
    """

    def __init__(self, spellings: SpecialSpellings, value: Any, taken: Collection[str]) -> None:
        self._spellings = spellings
        originals: set[str] = set()
        for text in strings_in(value):
            for start, end in spellings.spans(text):
                originals.update(text[start:end])
        free = (chr(code) for code in _MARKS if chr(code) not in taken)
        self._marks = dict(zip(sorted(originals), free, strict=False))
        self._restore = {ord(mark): original for original, mark in self._marks.items()}

    def mark(self, value: Any) -> Any:
        """Copy a JSON-like value with every spelled special token marked."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """Put the original characters back; the length does not change."""
        return text.translate(self._restore)

    def is_marked(self, text: str) -> bool:
        """Whether text holds any mark."""
        return not self._restore.keys().isdisjoint(map(ord, text))

    def _mark_text(self, text: str) -> str:
        spans = self._spellings.spans(text)
        if not spans:
            return text
        characters = list(text)
        for start, end in spans:
            characters[start:end] = [self._marks[c] for c in text[start:end]]
        return "".join(characters)
