"""What a model allows of a request: length, token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchwright.errors import RequestError
from batchwright.request import DEFAULT_MAX_TOKENS, Request, SamplingParams, Task


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The limits of a loaded model.

    Attributes:
        max_model_len: most tokens of a sequence, prompt and output.
        vocab_size: token ids are below it.
    """

    max_model_len: int
    vocab_size: int

    def check(self, request: Request) -> int:
        """Check a request; returns the number of tokens at which its sequences end.

        Raises:
            RequestError: it can never run.
        """
        self._check_prompt(request)
        self._check_params(request.params)
        num_prompt = len(request.prompt_token_ids)
        if request.task is Task.GENERATE:
            max_tokens = request.params.max_tokens or DEFAULT_MAX_TOKENS
            return min(num_prompt + max_tokens, self.max_model_len)
        if request.task is Task.SCORE and num_prompt <= request.score_start:
            raise RequestError(
                "there is no token to score: the continuation is empty, or context and "
                "continuation together have no more tokens than the context; give both as token ids"
            )
        return num_prompt

    def _check_prompt(self, request: Request) -> None:
        num_prompt, token_ids = len(request.prompt_token_ids), request.prompt_token_ids
        if not num_prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if token_ids.view(np.uint32).max() >= self.vocab_size:  # negative ones are large then
            index = int(((token_ids < 0) | (token_ids >= self.vocab_size)).argmax())
            raise RequestError(
                f"prompt has token id {token_ids[index]} at index {index}; "
                f"the model's are 0 to {self.vocab_size - 1}",
                param="prompt",
            )
        generates = request.task is Task.GENERATE
        limit = self.max_model_len - 1 if generates else self.max_model_len
        if num_prompt > limit:
            raise RequestError(
                f"prompt has {num_prompt} tokens, model allows {limit}"
                f"{' and one to generate' if generates else ''}; shorten it "
                f"(custom_id={request.id})",
                code="context_length_exceeded",
                param="prompt",
            )

    def _check_params(self, params: SamplingParams) -> None:
        for param in ("logit_bias", "stop_token_ids"):
            for token_id in getattr(params, param):
                if not 0 <= token_id < self.vocab_size:
                    raise RequestError(
                        f"{param} names token id {token_id}; the model's ids are "
                        f"0 to {self.vocab_size - 1}",
                        param=param,
                    )
