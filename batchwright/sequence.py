"""Sequence: one token stream of a request, from waiting to finished. No torch, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from batchwright.prompt_layout import Segment
from batchwright.request import FinishReason, Int32Array, Request, Task

NO_SLOT = -1
NO_NODES: Int32Array = np.empty(0, np.int32)


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One of a request's `n` token streams. Fields below `token_ids` belong to the scheduler.

    Attributes:
        order: place in the job; earlier sequences go first and are preempted last.
        sample_index: which of the request's n samples this is.
        end_token_ids: tokens that end it.
        noise_key: key of its randomness (uint64).
        max_len: tokens, prompt and output, at which it ends.
        siblings: the other samples, which fork from this one when the prompt is computed.
        token_ids: prompt and output known so far; up to date when the sequence holds no slot.
        nodes: its prompt's nodes in the prefix tree.
        segment: what it encodes, if it belongs to no request: `kv/segments.py`. Its `request` then
            only carries tokens, and the id of the row for which it runs.
        slot: where it runs, or NO_SLOT.
        num_in_flight: sampled tokens the scheduler has not been told yet.
        num_computed_once: high-water mark of computed tokens, to count recomputation.
        num_cached_tokens: prompt tokens taken from shared blocks at first admission.
        stop_reason: the token id or string that ended it, if one did.
        expected_output: output tokens it will have on average; None: nobody has estimated it.
        expected_len: tokens at which it will probably have ended; at most max_len.
    """

    request: Request
    order: int
    sample_index: int
    end_token_ids: tuple[int, ...]
    noise_key: int
    max_len: int
    siblings: list[Sequence] = field(default_factory=list)
    token_ids: Int32Array

    nodes: Int32Array = field(default_factory=lambda: NO_NODES)
    segment: Segment | None = None
    slot: int = NO_SLOT
    num_in_flight: int = 0
    num_computed_once: int = 0
    num_cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    expected_output: float | None = None
    expected_len: int = 0

    def __post_init__(self) -> None:
        self.expected_len = self.expected_len or self.max_len

    def start_over(self) -> None:
        """Forget everything but the request, as if it had never been started."""
        self.token_ids = self.request.prompt_token_ids
        self.siblings, self.nodes = [], NO_NODES
        self.slot, self.num_in_flight = NO_SLOT, 0
        self.finish_reason = self.stop_reason = None

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def samples(self) -> bool:
        """Whether it draws tokens at all."""
        return self.request.task is Task.GENERATE and self.segment is None

    @property
    def compute_end(self) -> int:
        """Tokens whose hidden states are needed: computing stops here.

        The last output token is never fed back, and a score needs no logits after the last token.
        """
        needs_all = self.request.task is Task.EMBED or self.segment is not None
        return self.max_len if needs_all else self.max_len - 1

    @property
    def first_needed_position(self) -> int:
        """First position that must be computed even if all KV is there: its output is wanted."""
        request = self.request
        if request.task is Task.EMBED:
            return 0 if request.pooling == "mean" else self.num_prompt_tokens - 1
        if request.task is Task.SCORE:
            return request.score_start - 1
        return 0 if self.score_start is not None else len(self.token_ids) - 1

    @property
    def score_start(self) -> int | None:
        """First position whose token is scored, None if none is."""
        if self.request.task is Task.SCORE:
            return self.request.score_start
        # The samples of a request share the prompt: its scores are taken once.
        wanted = self.request.params.prompt_logprobs is not None and self.sample_index == 0
        return 1 if wanted else None

    @property
    def is_watched(self) -> bool:
        """Its tokens must be seen one by one (stop strings, loops, logprobs, a grammar)."""
        params = self.request.params
        looks_for_ends = bool(params.stop) or params.repetition_detection is not None
        return looks_for_ends or params.logprobs is not None or self.is_constrained

    @property
    def is_constrained(self) -> bool:
        """Which token it may draw next depends on the tokens before it."""
        return self.samples and self.request.params.grammar is not None
