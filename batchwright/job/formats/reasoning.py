"""Splitting reasoning from the answer: `<think>...</think>` at the start of a text."""

from __future__ import annotations

from batchwright.text.markup import THINK_END, THINK_START


def opens_reasoning(prompt: str) -> bool:
    """Whether the chat template has begun the reasoning at the end of the prompt."""
    return prompt.rstrip().endswith(THINK_START)


def split_reasoning(text: str, is_open: bool) -> tuple[str | None, str | None]:
    """Split a text, in linear time.

    Args:
        text: what the model wrote.
        is_open: the prompt has begun the reasoning.
    Returns:
        (reasoning, content). The reasoning is None if there is none; the content is None if the
        reasoning was not finished. Line breaks around the marks belong to neither.
    """
    start = text.lstrip()
    if start.startswith(THINK_START):
        text = start[len(THINK_START) :]
    elif not is_open:
        return None, text
    reasoning, end, content = text.partition(THINK_END)
    return reasoning.strip("\n"), content.lstrip("\n") if end else None
