"""Matcher: follows one sequence through its grammar and says which tokens may come next."""

from __future__ import annotations

import llguidance
import numpy as np
import numpy.typing as npt

from batchwright.errors import RequestError
from batchwright.request import SamplingParams
from batchwright.structured.vocabulary import Vocabulary

UInt32Array = npt.NDArray[np.uint32]


class Matcher:
    """What the grammar allows after the tokens consumed so far.

    End tokens are allowed where the grammar is satisfied, and so are the row's stop tokens, which
    are allowed nowhere else. Before min_tokens they are forbidden while anything else is possible:
    a grammar that can only end there does.

    Args:
        inner: at the start of an output; owned by this object.
        vocabulary: the model's tokens.
        params: stop_token_ids and min_tokens are read.
        num_words: words of a mask.

    Attributes:
        num_consumed: tokens taken so far.
        error: why no token can follow, if that is so.
    """

    def __init__(
        self,
        inner: llguidance.LLMatcher,
        vocabulary: Vocabulary,
        params: SamplingParams,
        num_words: int,
    ) -> None:
        self._inner = inner
        self._tokens = vocabulary.tokens
        self._end_ids = set(vocabulary.end_ids)
        self._stop_ids = set(params.stop_token_ids) - self._end_ids
        self._min_tokens = params.min_tokens
        self.num_words = num_words
        self.num_consumed = 0
        self.error: RequestError | None = None

    @property
    def is_complete(self) -> bool:
        """The grammar is satisfied and nothing but an end token can follow."""
        return self._inner.is_stopped() and self._inner.is_accepting()

    def fill(self, mask: UInt32Array) -> None:
        """Write which tokens may come next.

        Args:
            mask: [num_words] uint32, bit v % 32 of word v // 32 for token v. All zero if no token
                may come; `error` then says why.
        """
        self._inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._inner.is_error():
            mask[:] = 0
            reason = " ".join(self._inner.get_error().replace("<non-verbose/>", "").split())
            self.error = _stuck(f"the grammar cannot go on from here: {reason[:300]}")
            return
        if self._stop_ids:
            may_end = self._inner.is_accepting()
            for token_id in self._stop_ids:
                _set(mask, token_id, may_end)
        if self.num_consumed < self._min_tokens:
            self._put_off_the_end(mask)
        if not mask.any():
            self.error = _stuck("stop_token_ids forbid every token that the grammar allows here")

    def _put_off_the_end(self, mask: UInt32Array) -> None:
        allowed = mask.copy()
        for token_id in self._end_ids | self._stop_ids:
            _set(mask, token_id, False)
        if not mask.any():
            mask[:] = allowed

    def consume(self, token_id: int) -> None:
        """Take the token that was drawn; end and stop tokens change nothing."""
        self.num_consumed += 1
        if token_id not in self._end_ids and token_id not in self._stop_ids:
            self._inner.consume_token(token_id)

    def text(self, token_ids: list[int]) -> str:
        """The text of an output as the grammar sees it: the tokens' bytes, one after the other.

        A tokenizer's decoder may drop a space at the start, which the grammar has asked for.
        """
        return b"".join(self._tokens[token_id] for token_id in token_ids).decode(errors="replace")


def _set(mask: UInt32Array, token_id: int, allowed: bool) -> None:
    bit = np.uint32(1 << token_id % 32)
    if allowed:
        mask[token_id // 32] |= bit
    else:
        mask[token_id // 32] &= ~bit


def _stuck(reason: str) -> RequestError:
    return RequestError(
        f"structured output: {reason}; simplify the grammar", code="grammar_dead_end"
    )
