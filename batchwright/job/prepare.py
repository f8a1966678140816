"""From ParsedRows to Requests: chat template and tokens.

The prompt's length and all token ids are checked by the engine, which knows the limits for all its
callers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from batchwright.errors import RequestError
from batchwright.job.validate import ParsedRow
from batchwright.request import Request


class Tokenizer(Protocol):
    """What preparing rows needs of `text.tokenizer.Tokenizer`."""

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[list[int]]: ...

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = False,
    ) -> tuple[str, list[int]]: ...


def prepare_rows(rows: Sequence[ParsedRow], tokenizer: Tokenizer) -> list[Request | RequestError]:
    """Tokenise rows; prompts that are plain text are encoded together, which is done in parallel.

    Returns:
        For each row its Request, or why it has none: the template rejects the messages, or the
        vocabulary cannot express the text. Errors carry the line.
    """
    encoded = _encode_prompts(rows, tokenizer)
    prepared: list[Request | RequestError] = []
    for index, row in enumerate(rows):
        try:
            prepared.append(_prepare(row, encoded.get(index), tokenizer))
        except RequestError as error:
            error.line = row.line
            prepared.append(error)
    return prepared


def _encode_prompts(rows: Sequence[ParsedRow], tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Token ids of text prompts, by index of the row. Of a batch with a bad text nothing is
    returned: its rows are then encoded one by one, and only the bad one fails."""
    batches: dict[tuple[bool, bool], dict[int, str]] = defaultdict(dict)
    for index, row in enumerate(rows):
        if row.prompt is not None:
            batches[row.add_special_tokens, row.parse_special][index] = row.prompt
    encoded: dict[int, list[int]] = {}
    for (add_special_tokens, parse_special), texts in batches.items():
        try:
            ids = tokenizer.encode_batch(
                list(texts.values()),
                add_special_tokens=add_special_tokens,
                parse_special=parse_special,
            )
        except RequestError:
            continue
        encoded.update(zip(texts, ids, strict=True))
    return encoded


def _prepare(row: ParsedRow, encoded: list[int] | None, tokenizer: Tokenizer) -> Request:
    prompt, token_ids = (row.prompt, encoded) if encoded is not None else _encode(row, tokenizer)
    return Request(
        id=row.custom_id,
        prompt_token_ids=np.array(token_ids, np.int32),
        params=row.params,
        prompt=prompt,
    )


def _encode(row: ParsedRow, tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
    """(prompt text or None, token ids) of one row."""
    if row.prompt_token_ids is not None:
        return None, row.prompt_token_ids
    if row.prompt is not None:
        return row.prompt, tokenizer.encode_batch(
            [row.prompt],
            add_special_tokens=row.add_special_tokens,
            parse_special=row.parse_special,
        )[0]
    assert row.messages is not None
    return tokenizer.encode_chat(
        row.messages,
        add_generation_prompt=row.add_generation_prompt,
        tools=row.tools,
        template_kwargs=row.template_kwargs,
        continue_final_message=row.continue_final_message,
        parse_special=row.parse_special,
    )
