"""Results as response bodies, in the form of the endpoint that was asked."""

from __future__ import annotations

from typing import Any

from batchwright.job.answer import AnswerForm, TokenBytes
from batchwright.job.formats.chat_body import chat_body
from batchwright.job.formats.completion_body import completion_body
from batchwright.job.formats.embedding_body import embedding_body
from batchwright.job.formats.score_body import score_body
from batchwright.job.rows import CHAT, COMPLETIONS, EMBEDDINGS
from batchwright.request import Result


def response_body(
    result: Result, form: AnswerForm, token_bytes: TokenBytes, *, model: str, created: int
) -> dict[str, Any]:
    """The body of a finished row's response.

    Args:
        result: without an error, each output finished by stop or length.
        form: how the row wants it.
        token_bytes: used only if log-probabilities or an echo of token ids were asked for.
        model: the name to put in the body.
        created: seconds since 1970, of the job.
    """
    if form.endpoint == CHAT:
        return chat_body(result, form, token_bytes, model=model, created=created)
    if form.endpoint == COMPLETIONS:
        return completion_body(result, form, token_bytes, model=model, created=created)
    if form.endpoint == EMBEDDINGS:
        return embedding_body(result, form, model=model, created=created)
    return score_body(result, model=model, created=created)
