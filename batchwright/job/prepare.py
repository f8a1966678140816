"""From ParsedRows to Requests: chat template and tokens.

The prompt's length and all token ids are checked by the engine, which knows the limits for all its
callers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from batchwright.errors import RequestError
from batchwright.job.validate import ParsedRow, Prompt
from batchwright.parts import entry_error, part_id
from batchwright.prompt_cache.call import PromptCall
from batchwright.prompt_cache.compose import PromptSchemas
from batchwright.request import NO_MARKUP, Markup, Request, Task
from batchwright.structured.spec import GrammarSpec
from batchwright.text import continuation
from batchwright.text.chat_template import Template

Encoded = dict[tuple[int, int], list[int]]


class Tokenizer(continuation.Tokenizer, Protocol):
    """What preparing rows needs of `text.tokenizer.Tokenizer`."""

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = False,
        template: Template | None = None,
    ) -> tuple[str, list[int]]: ...

    def markup(self, *, with_tools: bool, template: Template | None = None) -> Markup: ...


class Grammars(Protocol):
    """What preparing rows needs of `structured.compile.GrammarCompiler`."""

    def compile(self, spec: GrammarSpec) -> object: ...

    def template(self, source: str) -> Template: ...


def prepare_rows(
    rows: Sequence[ParsedRow],
    tokenizer: Tokenizer,
    grammars: Grammars | None = None,
    schemas: PromptSchemas | None = None,
) -> list[Request | RequestError]:
    """Tokenise rows; prompts that are plain text are encoded together, which is done in parallel.

    Args:
        grammars: compiles the rows' grammars here, so that the engine finds them ready, and
            renders templates that rows bring. None: grammars are left to the engine.
        schemas: those that rows may name in prompt_cache.
    Returns:
        For each row its Request, or why it has none: the template rejects the messages, the
        vocabulary cannot express the text, or the grammar does not compile. Errors carry the line.
    """
    encoded = _encode_prompts(rows, tokenizer)
    prepared: list[Request | RequestError] = []
    for index, row in enumerate(rows):
        try:
            if row.params.grammar is not None and grammars is not None:
                grammars.compile(row.params.grammar)
            if row.prompts is not None:
                prepared.append(_prepare_parts(row, row.prompts, index, encoded, tokenizer))
                continue
            template = _own_template(row, grammars)
            request = _prepare(row, encoded.get((index, 0)), tokenizer, template)
            if row.prompt_cache is not None:
                request = _with_modules(request, row, row.prompt_cache, schemas)
            prepared.append(request)
        except RequestError as error:
            error.line = row.line
            prepared.append(error)
    return prepared


def _encode_prompts(rows: Sequence[ParsedRow], tokenizer: Tokenizer) -> Encoded:
    """Token ids of text prompts, by index of the row and of the prompt in it.

    Of a batch with a bad text nothing is returned: its rows are then encoded one by one, and only
    the bad one fails.
    """
    batches: dict[tuple[bool, bool], dict[tuple[int, int], str]] = defaultdict(dict)
    for index, row in enumerate(rows):
        if row.continuation is not None:
            continue
        texts = batches[row.add_special_tokens, row.parse_special]
        if row.prompt is not None:
            texts[index, 0] = row.prompt
        for place, prompt in enumerate(row.prompts or ()):
            if isinstance(prompt, str):
                texts[index, place] = prompt
    encoded: Encoded = {}
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


def _own_template(row: ParsedRow, grammars: Grammars | None) -> Template | None:
    """The template that the row brings, if it brings one."""
    if row.chat_template is None:
        return None
    if grammars is None:
        raise RequestError(
            "chat_template is not supported here; remove it",
            code="unsupported_parameter",
            param="chat_template",
        )
    return grammars.template(row.chat_template)


def _prepare(
    row: ParsedRow, encoded: list[int] | None, tokenizer: Tokenizer, template: Template | None
) -> Request:
    if row.continuation is not None:
        return _prepare_pair(row, row.continuation, tokenizer)
    if encoded is not None:
        prompt, token_ids = row.prompt, encoded
    else:
        prompt, token_ids = _encode(row, tokenizer, template)
    markup = NO_MARKUP
    if row.messages is not None and row.params.grammar is None:  # else: all of it is the answer
        markup = tokenizer.markup(with_tools=row.tools is not None, template=template)
    return Request(
        id=row.custom_id,
        prompt_token_ids=np.array(token_ids, np.int32),
        params=row.params,
        task=row.task,
        prompt=prompt,
        pooling=row.pooling,
        markup=markup,
    )


def _with_modules(
    request: Request, row: ParsedRow, call: PromptCall, schemas: PromptSchemas | None
) -> Request:
    """The request with the modules of a schema before its prompt."""
    if schemas is None:
        raise RequestError(
            "prompt_cache needs a schema, and there is none; give its file with --prompt-schema "
            "to batchwright run or serve, or remove prompt_cache",
            code="unknown_prompt_schema",
            param="prompt_cache",
        )
    text_ids = request.prompt_token_ids.tolist()
    ids, layout = schemas.compose(call, text_ids, parse_special=row.parse_special)
    return replace(request, prompt_token_ids=np.array(ids, np.int32), layout=layout)


def _prepare_parts(
    row: ParsedRow, prompts: Sequence[Prompt], index: int, encoded: Encoded, tokenizer: Tokenizer
) -> Request:
    """A request made of one part for each prompt."""
    parts = []
    for place, prompt in enumerate(prompts):
        part = replace(
            row,
            custom_id=part_id(row.custom_id, place),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=None if isinstance(prompt, str) else prompt,
            prompts=None,
        )
        try:
            parts.append(_prepare(part, encoded.get((index, place)), tokenizer, None))
        except RequestError as error:
            raise entry_error(place, error) from None
    return Request(
        id=row.custom_id,
        prompt_token_ids=np.empty(0, np.int32),
        params=row.params,
        task=row.task,
        parts=tuple(parts),
    )


def _prepare_pair(row: ParsedRow, scored: str | list[int], tokenizer: Tokenizer) -> Request:
    context = row.prompt if row.prompt is not None else row.prompt_token_ids
    assert context is not None
    token_ids, score_start = continuation.join(
        tokenizer,
        context,
        scored,
        add_special_tokens=row.add_special_tokens,
        parse_special=row.parse_special,
    )
    return Request(
        id=row.custom_id,
        prompt_token_ids=np.array(token_ids, np.int32),
        params=row.params,
        task=Task.SCORE,
        score_start=score_start,
    )


def _encode(
    row: ParsedRow, tokenizer: Tokenizer, template: Template | None
) -> tuple[str | None, list[int]]:
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
        template=template,
    )
