"""Bodies of /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from batchwright.job.answer import AnswerForm, response_id
from batchwright.request import Float32Array, Result


def embedding_body(result: Result, form: AnswerForm, *, model: str, created: int) -> dict[str, Any]:
    """See `response_body`."""
    num_tokens = len(result.prompt_token_ids)
    return {
        "id": f"embd-{response_id(result.request_id)}",
        "object": "list",
        "created": created,
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(part, form)}
            for index, part in enumerate(result.parts or [result])
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _written(result: Result, form: AnswerForm) -> str | list[float]:
    assert result.embedding is not None
    embedding = _unit(result.embedding) if form.normalize else result.embedding
    if form.base64:
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = embedding.tolist()
    return numbers


def _unit(embedding: Float32Array) -> Float32Array:
    """Scaled to length 1, computed in float64; all zeros stay so."""
    length = np.linalg.norm(embedding.astype(np.float64))
    return (embedding / length).astype(np.float32) if length > 0 else embedding
