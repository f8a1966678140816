"""Columns to requests: which column is which parameter, and what becomes of the others.

    {"review": "Nice", "stars": 5}    --template "Classify: {review}"
    -> prompt "Classify: Nice", and "stars": 5 passes through to the output

Columns that are neither mapped nor named in the template pass through unchanged. Nothing is guessed
from data: without any mapping, only columns called prompt, messages, prompt_token_ids or input, and
custom_id or id, are taken for what they are called.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from batchwright.errors import InputError, RequestError
from batchwright.job.formats.column_map import PROMPTS, ColumnMap
from batchwright.job.formats.prompt_template import bad_cell
from batchwright.job.formats.row_names import id_text
from batchwright.job.rows import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    UNNAMED,
    InputRow,
    RowError,
    endpoint_of_bare_row,
)
from batchwright.validation.params import MAX_TOKENS_ALIASES, PARAM_NAMES

IDS = ("custom_id", "id")
MAX_COLUMNS_SHOWN = 20

_TEXT = frozenset(("prompt", "input", "model", "user", "chat_template"))  # never read as JSON
_logger = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Columns:
    """A ColumnMap applied to one input: makes rows of cells.

    Args:
        given: what the user says.
        names: the input's columns.
        source: what messages call the input.
        is_text: cells are text that stands for numbers and the like (CSV).
        is_sample: names are those of the first row; optional parameters may come later.
    Raises:
        InputError: a column is not there, or nothing says what the prompt is.
    """

    def __init__(
        self,
        given: ColumnMap,
        names: Sequence[str],
        source: str,
        *,
        is_text: bool = False,
        is_sample: bool = False,
    ) -> None:
        self._is_text = is_text
        self._template = given.template
        self._params = dict(given.columns)
        if given.template is None and not any(param in self._params for param in PROMPTS):
            self._params |= _prompt_by_name(given, names, source)
        self._id_column = self._params.pop("custom_id", None)
        if self._id_column is None:
            self._id_column = next((name for name in IDS if name in names), "")
        needed = [name for param, name in self._params.items() if param in PROMPTS or not is_sample]
        needed += given.template.columns if given.template else ()
        needed += [self._id_column] if self._id_column and not is_sample else []
        for name in needed:
            if name not in names:
                raise InputError(f"{source} has no column {name!r:.80}; it has {_shown(names)}")
        self._used = {*self._params.values(), self._id_column}
        self._used.update(given.template.columns if given.template else ())
        self._endpoint = given.endpoint or (COMPLETIONS if given.template else None)
        self._warn(names)

    def row(self, line: int, cells: dict[str, Any], num_bytes: int) -> InputRow | RowError:
        """The request that a row's cells make; a row that makes none is a RowError."""
        custom_id = None
        extra = {name: cell for name, cell in cells.items() if name not in self._used} or None
        try:
            extra_problem = None if self._is_text or extra is None else _unwritable(extra)
            if extra_problem is not None:
                extra = None
                raise extra_problem
            custom_id = self._given_id(cells)
            body = self._body(cells)
        except RequestError as error:
            error.line = line
            return RowError(line, custom_id, error, num_bytes, extra)
        endpoint = self._endpoint or endpoint_of_bare_row(body)
        body = for_endpoint(body, endpoint)
        memory_bytes = sum(len(cell) for cell in cells.values() if isinstance(cell, str))
        return InputRow(line, custom_id, endpoint, body, num_bytes, extra, memory_bytes)

    def _given_id(self, cells: Mapping[str, Any]) -> str:
        value = cells.get(self._id_column) if self._id_column else None
        if value is None or (self._is_text and value == ""):
            return UNNAMED
        return id_text(self._id_column or "custom_id", value)

    def _body(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        body: dict[str, Any] = {}
        for param, name in self._params.items():
            value = cells.get(name)
            if value is not None and not (self._is_text and value == ""):
                body[param] = self._value(param, value)
            elif param in PROMPTS:
                raise bad_cell(name, f"is empty; it gives the row's {param}")
        if self._template is not None:
            body["prompt"] = self._template.fill(cells)
        return body

    def _value(self, param: str, value: Any) -> Any:
        """A parameter's value: of text cells what they spell, of Arrow's objects what they hold."""
        if not isinstance(value, str):
            return _without_nulls(value)
        if param in _TEXT or not (self._is_text or value.lstrip()[:1] in ("[", "{")):
            return value
        try:
            return _decode(value)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return value

    def _warn(self, names: Sequence[str]) -> None:
        """Say once which columns look like parameters and are not used as such."""
        known = PARAM_NAMES.union(MAX_TOKENS_ALIASES)
        if unused := [name for name in names if name in known and name not in self._used]:
            _logger.warning(
                "Columns that pass through, though parameters are called so: %s. To use one, add "
                "--column %s=%s.",
                ", ".join(unused),
                unused[0],
                unused[0],
            )


def _prompt_by_name(given: ColumnMap, names: Sequence[str], source: str) -> dict[str, str]:
    """The prompt's column where the user names none."""
    found = [name for name in PROMPTS if name in names and name not in given.columns.values()]
    if found:
        return {found[0]: found[0]}
    if given.endpoint not in (None, CHAT, COMPLETIONS) or "context" in given.columns:
        return {}
    raise InputError(
        f"{source} has no column called prompt or messages; say which column is the prompt with "
        f"--column prompt=NAME or --template 'Text: {{NAME}}'; it has {_shown(names)}"
    )


def for_endpoint(body: dict[str, Any], endpoint: str) -> dict[str, Any]:
    """A prompt is one user message in a chat, and the input of an embedding."""
    if "prompt" in body and endpoint == CHAT and "messages" not in body:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    elif "prompt" in body and endpoint == EMBEDDINGS and "input" not in body:
        body["input"] = body.pop("prompt")
    return body


def _unwritable(extra: dict[str, Any]) -> RequestError | None:
    """Why cells cannot be written to the output, if they cannot."""
    try:
        _encode(extra)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return RequestError(f"columns cannot be passed through: {error}")
    return None


def _without_nulls(value: Any) -> Any:
    """Arrow fills absent keys of an object with null; chat templates would take them for given."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name:.80}" for name in names[:MAX_COLUMNS_SHOWN])
    return shown + (", ..." if len(names) > MAX_COLUMNS_SHOWN else "")
