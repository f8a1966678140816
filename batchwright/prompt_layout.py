"""PromptLayout: a prompt whose tokens do not simply stand at positions 0, 1, 2, ...

Its first tokens are those of segments: runs of text that were encoded by themselves, each token
seeing only tokens of its own segment, and whose keys and values many prompts take over. All other
tokens are computed and see everything before them. Used by Prompt Cache (arXiv:2311.04934), see
`prompt_cache/`; the engine knows segments and positions, not schemas. No torch, no files.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

Runs = tuple[tuple[int, int], ...]
"""Positions of consecutive tokens, as (first position, number of tokens)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that are encoded together and see only each other.

    Equal segments have equal keys and values, so this is the key of their cache.

    Attributes:
        token_bytes: the token ids, as the bytes of an int32 array.
        runs: their positions, which rise from token to token.
        namespace: that of the requests that import it.
    """

    token_bytes: bytes
    runs: Runs
    namespace: str = ""

    @classmethod
    def of(cls, token_ids: Iterable[int], runs: Runs, namespace: str = "") -> Segment:
        """A segment from token ids."""
        return cls(np.fromiter(token_ids, np.int32).tobytes(), runs, namespace)

    @property
    def token_ids(self) -> Int32Array:
        """[num_tokens] int32."""
        return np.frombuffer(self.token_bytes, np.int32)

    @property
    def num_tokens(self) -> int:
        """How many there are."""
        return len(self.token_bytes) // 4


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """Where the tokens of a prompt stand, and which of them are taken from segments.

    Attributes:
        segments: the prompt begins with their tokens, in this order.
        runs: positions of the tokens after them. Output tokens follow the last of these.
    """

    segments: tuple[Segment, ...]
    runs: Runs

    @property
    def num_imported(self) -> int:
        """Leading tokens that are taken from segments."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def end(self) -> int:
        """Position of the first output token."""
        position, length = self.runs[-1]
        return position + length

    @property
    def shift(self) -> int:
        """How much larger the position of an output token is than its index in the sequence."""
        return self.end - self.num_imported - sum(length for _, length in self.runs)

    @property
    def prefix_key(self) -> Hashable:
        """Equal for prompts whose equal tokens have equal keys and values: all but the length of
        the last run."""
        return self.segments, self.runs[:-1], self.runs[-1][0]

    def positions(self) -> Int32Array:
        """[num_prompt_tokens] int32, the position of each token of the prompt."""
        runs = [run for segment in self.segments for run in segment.runs]
        return positions_of((*runs, *self.runs))


def positions_of(runs: Runs) -> Int32Array:
    """[num_tokens] int32 of runs."""
    return np.concatenate([np.arange(p, p + n, dtype=np.int32) for p, n in runs])
