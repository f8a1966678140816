"""ExpectedLengths: what a length predictor says of the rows in the engine, kept up to date.

Rows that have ended are collected; the predictor is told of them, and asked anew, when they have
become a good part of all that it knows. So the work is a few milliseconds every now and then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np

from batchwright.plan.job_tree import Int64Array
from batchwright.plan.length_predictor import LengthPredictor, Rows, within_limits
from batchwright.request import FinishReason, Int32Array
from batchwright.sequence import Sequence

FIRST_ENDED = 8
"""Rows that must have ended before the predictor is told of any."""

NEW_SHARE = 0.5
"""It is told again when those that ended since are this share of all before,"""

MOST_NEW = 1024
"""or so many; of more, when nobody asks, the oldest are forgotten."""

BY_ITSELF = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION)


class RunningRows(Protocol):
    """Sequences that run: their lengths so far tell something, and what is expected of them may
    change."""

    def so_far(self) -> tuple[list[Sequence], Int64Array]:
        """The sequences, with what is expected of them now, and their output tokens."""
        ...

    def take_expected(self, sequences: Seq[Sequence]) -> None:
        """Other lengths are expected of these."""
        ...


class ExpectedLengths:
    """See the module docstring.

    Attributes:
        predictor: who is asked.
        running: the sequences that run, once there are any.
        num_ended: rows that ended by themselves, of those whose length was not known before.
    """

    def __init__(self, predictor: LengthPredictor) -> None:
        self.predictor = predictor
        # Prompt, most, output of rows that the predictor has not been told of.
        self._ended: deque[tuple[Int32Array, int, int]] = deque(maxlen=MOST_NEW)
        self.running: RunningRows | None = None
        self._num_told = 0
        self.num_ended = 0

    def note_end(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        if sequence.finish_reason in BY_ITSELF and not is_certain(sequence):
            num_prompt = sequence.num_prompt_tokens
            most, output = sequence.max_len - num_prompt, len(sequence.token_ids) - num_prompt
            self.note_earlier(sequence.request.prompt_token_ids, most, output)

    def note_earlier(self, prompt: Int32Array, most: int, output: int) -> None:
        """A row with this prompt that might have `most` output tokens had `output`."""
        self._ended.append((prompt, most, output))
        self.num_ended += 1

    @property
    def is_due(self) -> bool:
        """Whether enough has become known to ask again."""
        return len(self._ended) >= max(FIRST_ENDED, min(NEW_SHARE * self._num_told, MOST_NEW))

    @property
    def knows_any(self) -> bool:
        """Whether rows that have ended can tell something about others."""
        return self._num_told > 0 or self.is_due

    def estimate(self, sequences: Iterable[Sequence]) -> None:
        """Set what is expected of sequences that wait, and of those that run if more is known now.

        Of a row that has not started only the first sequence is given; its siblings are alike.
        """
        waiting = list(sequences)
        is_new = self.is_due
        if is_new:
            prompts, allowed, output = zip(*self._ended, strict=True)
            self.predictor.learn(Rows(prompts, np.array(allowed)), np.array(output))
            self._num_told += len(self._ended)
            self._ended.clear()
        running, so_far = self.running.so_far() if self.running else ([], NOTHING)
        known = [len(s.token_ids) - s.num_prompt_tokens for s in waiting]
        so_far = np.concatenate((np.array(known, np.int64), so_far))
        everybody = waiting + running
        if not everybody:
            return
        most = np.array([s.max_len - s.num_prompt_tokens for s in everybody])
        least = np.maximum([_least(s) for s in everybody], so_far)
        rows = Rows([s.request.prompt_token_ids for s in everybody], most)
        mean, upper = within_limits(self.predictor.predict(rows, so_far), least, most)
        memory = np.ceil(upper).astype(np.int64).tolist()
        lines = zip(mean.tolist(), memory, so_far.tolist(), strict=True)
        for sequence, line in zip(everybody, lines, strict=True):
            for member in (sequence, *sequence.siblings):
                _expect(member, *line)
        if self.running and is_new:
            self.running.take_expected(running)


NOTHING: Int64Array = np.empty(0, np.int64)


def _expect(sequence: Sequence, mean: float, memory: int, so_far: int) -> None:
    sequence.expected_output = mean
    if memory > so_far:  # else it has outgrown what is expected of its like
        sequence.expected_len = sequence.num_prompt_tokens + memory


def is_certain(sequence: Sequence) -> bool:
    """Whether a sequence can only end at its limit."""
    return _least(sequence) >= sequence.max_len - sequence.num_prompt_tokens


def _least(sequence: Sequence) -> int:
    return sequence.request.params.least_output(sequence.max_len - sequence.num_prompt_tokens)
