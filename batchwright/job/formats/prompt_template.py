"""Prompt templates: text with columns in it, such as `Classify: {review}`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from batchwright.errors import ConfigError, RequestError

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Template:
    """Text with columns in it; made by `parse_template`.

    Attributes:
        texts: what stands before, between and after the columns.
        columns: their names, one fewer than texts.
    """

    texts: tuple[str, ...]
    columns: tuple[str, ...]

    def fill(self, cells: Mapping[str, Any]) -> str:
        """The text with a row's cells in it.

        Raises:
            RequestError: a cell is missing or null, or all are empty.
        """
        parts, is_empty = [self.texts[0]], True
        for name, text in zip(self.columns, self.texts[1:], strict=True):
            value = cells.get(name)
            if value is None:
                problem = "null" if name in cells else "missing"
                raise bad_cell(name, f"is {problem}, and the template needs it")
            cell = _as_text(value)
            is_empty = is_empty and not cell
            parts += (cell, text)
        if is_empty:
            raise bad_cell(self.columns[0], "is empty, and the template has nothing else to fill")
        return "".join(parts)


def parse_template(text: str) -> Template:
    """Read `Classify: {text}`. `{{` and `}}` stand for braces.

    Raises:
        ConfigError: a single brace, or no column at all.
    """
    texts, columns, end = [""], [], 0
    for match in _FIELD.finditer(text):
        texts[-1] += text[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            texts[-1] += match[0][0]
        elif match[0] in ("{", "}") or not match[1]:
            raise ConfigError(
                f"--template has {match[0]!r} at character {match.start() + 1}; write "
                "{column} for a column, {{ and }} for braces"
            )
        else:
            columns.append(match[1])
            texts.append("")
    texts[-1] += text[end:]
    if not columns:
        raise ConfigError(f"--template {text!r:.80} names no column; write it like {{text}}")
    return Template(tuple(texts), tuple(columns))


def bad_cell(name: str, problem: str) -> RequestError:
    """The error of a row whose cell cannot be used."""
    return RequestError(
        f"column {name!r:.80} {problem}", code="missing_required_parameter", param=name[:80]
    )


def _as_text(value: Any) -> str:
    """A cell in a template: text as it is, anything else as JSON spells it."""
    if isinstance(value, str):
        return value
    try:
        value = msgspec.to_builtins(value)
        return value if isinstance(value, str) else _encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError(f"a cell cannot be written as text: {error}") from None
