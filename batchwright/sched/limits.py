"""StepLimits: how large Steps may be, less after memory ran out and, with care, more again."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

MIN_TOKENS = 16
"""Token budget below which a Step takes hardly less memory (products are padded to 12 rows)."""

UNLIMITED = 2**30

FIRST_WAIT_STEPS = 128
"""Good Steps after which limits that were halved are doubled for the first time."""


class StepLimits:
    """Slots in use at once and tokens of a Step; never more than was given.

    When memory runs out both are halved. After a number of good Steps they are doubled, which may
    fail again, since nobody knows why memory was short. Each failure of limits that had grown
    doubles that number, so N Steps see fewer than log2(N) such failures.

    Attributes:
        max_running: slots in use at once.
        max_tokens: tokens of a Step.
        max_prompt_tokens: of these, of sequences that lack more than one; the plan says how many
            it takes to spread prompts evenly.
        largest_max_tokens: what max_tokens may become again.
    """

    def __init__(self, max_running: int, max_tokens: int) -> None:
        self.max_running = self._largest_max_running = max_running
        self.max_tokens = self.largest_max_tokens = max_tokens
        self.max_prompt_tokens = UNLIMITED
        self._wait_steps = FIRST_WAIT_STEPS
        self._num_good_steps = 0  # since the limits changed
        self._has_grown = False  # since memory ran out

    def halve(self) -> bool:
        """Memory ran out: use half as much from now on; False: both limits are minimal."""
        self._num_good_steps = 0
        smallest = min(MIN_TOKENS, self.largest_max_tokens)
        if self.max_running == 1 and self.max_tokens == smallest:
            return False
        if self._has_grown:
            self._wait_steps *= 2
            self._has_grown = False
        self.max_running = max(self.max_running // 2, 1)
        self.max_tokens = max(self.max_tokens // 2, smallest)
        return True

    def num_tokens(self, num_singles: int) -> int:
        """Token budget of a Step in which so many sequences lack one token."""
        return min(self.max_tokens, num_singles + self.max_prompt_tokens)

    @property
    def are_full(self) -> bool:
        """Whether nothing is held back."""
        return (
            self.max_running == self._largest_max_running
            and self.max_tokens == self.largest_max_tokens
        )

    def step_succeeded(self) -> None:
        """A Step was computed; after enough of them the limits grow."""
        if self.are_full:
            return
        self._num_good_steps += 1
        if self._num_good_steps < self._wait_steps:
            return
        self._num_good_steps, self._has_grown = 0, True
        self.max_running = min(2 * self.max_running, self._largest_max_running)
        self.max_tokens = min(2 * self.max_tokens, self.largest_max_tokens)
        logger.info(
            "memory sufficed for %d steps; trying %d rows and %d tokens in a step again",
            self._wait_steps,
            self.max_running,
            self.max_tokens,
        )
