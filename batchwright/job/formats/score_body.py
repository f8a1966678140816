"""Bodies of /v1/score: the log-likelihood of a continuation."""

from __future__ import annotations

from typing import Any

from batchwright.job.answer import response_id
from batchwright.job.formats.logprobs import MIN_LOGPROB
from batchwright.job.formats.usage import usage
from batchwright.request import Result


def score_body(result: Result, *, model: str, created: int) -> dict[str, Any]:
    """See `response_body`. `logprob` is the sum of `token_logprobs`, in natural logarithms."""
    score = result.score
    assert score is not None
    token_logprobs = [max(logprob, MIN_LOGPROB) for logprob in score.token_logprobs.tolist()]
    return {
        "id": f"score-{response_id(result.request_id)}",
        "object": "score",
        "created": created,
        "model": model,
        "data": [
            {
                "object": "score",
                "index": 0,
                "logprob": sum(token_logprobs),
                "is_greedy": score.is_greedy,
                "num_tokens": len(token_logprobs),
                "token_logprobs": token_logprobs,
            }
        ],
        "usage": usage(result),
    }
