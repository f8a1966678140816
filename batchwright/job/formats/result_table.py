"""Result lines as tables: what each row of a CSV or Parquet output holds.

| column | content |
| --- | --- |
| custom_id | the row's name |
| text | of the first choice |
| finish_reason | of the first choice |
| texts | of all choices |
| error_code, error_message, error_line | why a row failed, and where it stands |
| prompt_tokens, completion_tokens | from usage |
| embedding | if there are embeddings |
| logprob | if there are scores |
| input columns | those that passed through; `input_NAME` if the name is taken above |
| response | the whole body, as JSON |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from batchwright.errors import OutputError

MAX_COLUMNS = 10_000

FIXED = (
    "custom_id",
    "text",
    "finish_reason",
    "texts",
    "error_code",
    "error_message",
    "error_line",
    "prompt_tokens",
    "completion_tokens",
)
EMBEDDING, LOGPROB, RESPONSE = "embedding", "logprob", "response"
_TAKEN = {*FIXED, EMBEDDING, LOGPROB, RESPONSE}

_INT64 = range(-(2**63), 2**63)
_encode = msgspec.json.Encoder().encode


class _Body(msgspec.Struct):
    object: str | None = None


class _Response(msgspec.Struct):
    body: _Body | None = None


class _Outline(msgspec.Struct):
    """The parts of a line that say which columns there are."""

    columns: dict[str, Any] | None = None
    response: _Response | None = None


_outline = msgspec.json.Decoder(_Outline).decode
_decode = msgspec.json.Decoder().decode


class TableShape:
    """The columns that a set of result lines needs, found by looking at all of them.

    Attributes:
        kinds: input columns in the order they came, and what they hold: "bool", "int", "float",
            "text", or "json" for anything else and for mixtures; None if there were only nulls.
        has_embeddings, has_scores: whether such rows were seen.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, str | None] = {}
        self.has_embeddings = False
        self.has_scores = False

    def note(self, line: bytes) -> None:
        """Take note of a line's columns.

        Raises:
            OutputError: there are more than MAX_COLUMNS.
        """
        outline = _outline(line)
        if outline.response is not None and outline.response.body is not None:
            self.has_embeddings |= outline.response.body.object == "list"
            self.has_scores |= outline.response.body.object == "score"
        for name, value in (outline.columns or {}).items():
            kind, before = _kind(value), self.kinds.get(name)
            if name not in self.kinds or (before is None and kind is not None):
                self.kinds[name] = kind
            elif kind is not None and kind != before:
                self.kinds[name] = "float" if {kind, before} == {"int", "float"} else "json"
        if len(self.kinds) > MAX_COLUMNS:
            raise OutputError(
                f"the rows have more than {MAX_COLUMNS} different columns, too many for a table; "
                "name a .jsonl file as output"
            )

    @property
    def names(self) -> list[str]:
        """All columns of the table, in order."""
        special = [EMBEDDING] * self.has_embeddings + [LOGPROB] * self.has_scores
        return [*FIXED, *special, *self.input_names().values(), RESPONSE]

    def input_names(self) -> dict[str, str]:
        """Input column -> its name in the table."""
        names: dict[str, str] = {}
        taken = _TAKEN | {name for name in self.kinds if name not in _TAKEN}
        for name in self.kinds:
            free = name
            while free in _TAKEN or (free != name and free in taken):
                free = f"input_{free}"
            taken.add(free)
            names[name] = free
        return names


def table_rows(lines: Iterable[bytes], shape: TableShape) -> Iterable[dict[str, Any]]:
    """The table's rows; a value that is not there is None, "json" columns hold JSON text."""
    names = shape.input_names()
    for line in lines:
        record = _decode(line)
        body = (record["response"] or {}).get("body") or {}
        error = record["error"] or {}
        usage = body.get("usage") or {}
        choices = body.get("choices") or []
        texts = [_choice_text(choice) for choice in choices]
        row = {
            "custom_id": record["custom_id"],
            "text": texts[0] if texts else None,
            "finish_reason": choices[0].get("finish_reason") if choices else None,
            "texts": texts or None,
            "error_code": error.get("code"),
            "error_message": error.get("message"),
            "error_line": error.get("line"),
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            RESPONSE: _encode(body).decode() if body else None,
        }
        data = (body.get("data") or [{}])[0]
        if shape.has_embeddings:
            row[EMBEDDING] = data.get("embedding")
        if shape.has_scores:
            row[LOGPROB] = data.get("logprob")
        for name, value in (record.get("columns") or {}).items():
            is_json = shape.kinds[name] == "json" and value is not None
            row[names[name]] = _encode(value).decode() if is_json else value
        yield row


def _choice_text(choice: dict[str, Any]) -> str | None:
    if "message" in choice:
        return choice["message"].get("content")
    return choice.get("text")


def _kind(value: Any) -> str | None:
    if value is None or isinstance(value, bool):
        return None if value is None else "bool"
    if isinstance(value, int):
        return "int" if value in _INT64 else "json"
    if isinstance(value, float):
        return "float"
    return "text" if isinstance(value, str) else "json"
