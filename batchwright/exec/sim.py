"""SimExecutor: answers Steps without a model and charges their time to a virtual clock.

The engine and scheduler around it are the real ones, so a simulated run makes the same Steps as a
real run with the same output lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from batchwright.clock import VirtualClock
from batchwright.plan.cost import keys_by_step
from batchwright.request import Int32Array
from batchwright.step import EqualResults, EqualSteps, NewSequence, Step, StepResult

ORDINARY_TOKEN = 0
"""What a sequence draws before its end, or the next larger id that does not end it."""

NEVER = np.iinfo(np.int32).max


class StepCost(Protocol):
    """How long a Step takes: `LinearCost`, `plan.cost.CostModel`, `plan.shared_keys.StepCosts`."""

    def seconds(self, step: Step) -> float:
        """Time of one Step."""
        ...

    def equal_seconds(self, steps: EqualSteps) -> float:
        """Time of equal Steps, all of them."""
        ...


@dataclass(frozen=True, slots=True)
class LinearCost:
    """A crude cost of a Step: fixed, per query token, and per key read.

    Defaults are of the order of a 135M-parameter model on two AVX2 cores.
    """

    step_s: float = 5e-3
    token_s: float = 2e-3
    key_s: float = 1e-7

    def seconds(self, step: Step) -> float:
        """Time of one Step; every row reads the keys up to its last position."""
        num_keys = int(step.positions[step.cu_seqlens_q[1:] - 1].sum()) + step.num_rows
        return self.step_s + self.token_s * step.num_tokens + self.key_s * num_keys

    def equal_seconds(self, steps: EqualSteps) -> float:
        """Time of equal Steps, all of them."""
        fixed_s = self.step_s + self.token_s * len(steps.slots)
        return steps.num_steps * fixed_s + self.key_s * int(keys_by_step(steps, None).sum())


class SimExecutor:
    """Draws an end token when a sequence reaches its true length, and an ordinary one before.

    Args:
        clock: advanced by each Step's cost.
        cost: seconds of a Step.
        output_length: true output length of a new sequence; None lets it run to its limit.
    """

    def __init__(
        self,
        clock: VirtualClock,
        cost: StepCost | None = None,
        output_length: Callable[[NewSequence], int | None] = lambda sequence: None,
    ) -> None:
        self._clock = clock
        self._cost = cost or LinearCost()
        self._output_length = output_length
        self._last_position: Int32Array = np.empty(0, np.int32)  # of the last output token
        self._end_token: Int32Array = np.empty(0, np.int32)
        self._ordinary_token: Int32Array = np.empty(0, np.int32)

    def execute(self, step: Step) -> StepResult:
        for sequence in step.new_sequences:
            self._install(sequence)
        self._clock.advance(self._cost.seconds(step))
        slots, positions = step.sample_slots, step.positions[step.sample_tokens] + 1
        is_last = positions >= self._last_position[slots]
        token_ids = np.where(is_last, self._end_token[slots], self._ordinary_token[slots])
        return StepResult(step_id=step.step_id, token_ids=token_ids)

    def execute_equal(self, steps: EqualSteps) -> EqualResults:
        """Execute equal Steps at once, up to the first in which a row reaches its true length."""
        slots, left = steps.slots, self._last_position[steps.slots] - steps.positions
        num_steps = min(steps.num_steps, max(int(left.min()), 1))
        self._clock.advance(self._cost.equal_seconds(steps._replace(num_steps=num_steps)))
        ordinary = self._ordinary_token[slots]
        token_ids = np.where(left <= num_steps, self._end_token[slots], ordinary)
        return EqualResults(num_steps, ordinary, token_ids)

    def close(self) -> None:
        pass

    def _install(self, sequence: NewSequence) -> None:
        missing = sequence.slot + 1 - len(self._last_position)
        if missing > 0:
            self._last_position = np.pad(self._last_position, (0, missing))
            self._end_token = np.pad(self._end_token, (0, missing))
            self._ordinary_token = np.pad(self._ordinary_token, (0, missing))
        length, ordinary = self._output_length(sequence), ORDINARY_TOKEN
        while ordinary in sequence.end_token_ids:
            ordinary += 1
        self._ordinary_token[sequence.slot] = ordinary
        has_end = length is not None and len(sequence.end_token_ids) > 0
        last = sequence.num_prompt_tokens + (length or 0) - 1
        self._last_position[sequence.slot] = last if has_end else NEVER
        self._end_token[sequence.slot] = sequence.end_token_ids[0] if has_end else 0
