"""What a model allows of a request: length, token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchwright.errors import RequestError
from batchwright.prompt_layout import PromptLayout
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
        if request.layout is not None:
            self._check_layout(request, request.layout)
        num_prompt = len(request.prompt_token_ids)
        shift = 0 if request.layout is None else request.layout.shift
        if request.task is Task.GENERATE:
            max_tokens = request.params.max_tokens or DEFAULT_MAX_TOKENS
            return min(num_prompt + max_tokens, self.max_model_len - shift)
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

    def _check_layout(self, request: Request, layout: PromptLayout) -> None:
        limit = self.max_model_len - (request.task is Task.GENERATE)
        if layout.end > limit:
            raise RequestError(
                f"prompt reaches position {layout.end - 1}, the model's are 0 to {limit - 1}"
                f"{' with one more to generate' if request.task is Task.GENERATE else ''}; "
                f"shorten it or its schema (custom_id={request.id})",
                code="context_length_exceeded",
                param="prompt",
            )
        if any(segment.namespace != request.namespace for segment in layout.segments):
            raise RequestError(
                f"a segment is of another namespace than the request, {request.namespace!r}; "
                "give both the same",
                param="prompt_cache",
            )
        first_needed = request.score_start - 1
        if request.task is Task.EMBED or request.params.prompt_logprobs is not None:
            first_needed = 0
        elif request.task is Task.GENERATE:
            first_needed = len(request.prompt_token_ids) - 1
        if first_needed < layout.num_imported:
            raise RequestError(
                "prompt_cache takes over keys and values, not the outputs of imported tokens; "
                "remove prompt_logprobs and echo, embeddings, or scores of imported tokens",
                param="prompt_cache",
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
