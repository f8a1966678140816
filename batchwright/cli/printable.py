"""Text of rows on a terminal: nothing in it can steer it."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text as it is, or escaped if it has characters that are not for printing."""
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
