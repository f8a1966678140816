"""Repetition stop: an output that has fallen into a loop ends, instead of filling max_tokens.

A sequence that repeats itself forever is computed to its limit, alone, when all others are done.
Rows may ask for it to be ended; nothing is ended that did not ask. Parameters are vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RepetitionDetection:
    """What counts as a loop: the same pattern of tokens, min_count times in a row at the end.

    Attributes:
        max_pattern_size, min_pattern_size: lengths of patterns that are looked for, in tokens.
        min_count: how often the pattern must stand there, at least 2.
    """

    max_pattern_size: int
    min_count: int
    min_pattern_size: int = 1


class RepetitionChecker:
    """Follows the output of one sequence, of which the first `min_tokens` are not judged.

    The end of the output is a pattern of p tokens, c times, exactly if each of the last
    p * (c - 1) tokens equals the one p places before it. So one count for each p suffices.
    """

    def __init__(self, detection: RepetitionDetection, min_tokens: int = 0) -> None:
        self._num_exempt = min_tokens
        self._widest = detection.max_pattern_size
        sizes = np.arange(detection.min_pattern_size, self._widest + 1)
        self._needed = sizes * (detection.min_count - 1)
        self._num_equal = np.zeros(len(sizes), np.int64)  # tokens in a row equal to the one p back
        self._tokens = np.full(2 * self._widest + 64, -1, np.int32)  # no token is -1
        self._end = self._widest  # of what is known; at least `widest` entries lie before it

    def append(self, token_id: int) -> bool:
        """Take the next token; returns whether the output ends in a loop now."""
        oldest_first = self._tokens[self._end - self._widest : self._end]
        p_back = oldest_first[::-1][-len(self._needed) :]
        self._num_equal = np.where(p_back == token_id, self._num_equal + 1, 0)
        if self._end == len(self._tokens):
            self._tokens[: self._widest] = oldest_first
            self._end = self._widest
        self._tokens[self._end] = token_id
        self._end += 1
        self._num_exempt -= 1
        return self._num_exempt <= 0 and bool((self._num_equal >= self._needed).any())
