"""The model is asked how long its answer will be (Response Length Perception, arXiv:2305.13144).

The question is the row's prompt and an instruction, so it costs the instruction and a few drawn
tokens: the prompt's blocks are kept for the row (`length_questions.py`). The paper tunes the model
for it with an adapter; a model as it is answers more or less at random. Opt-in.
"""

from __future__ import annotations

import re

import numpy as np

from batchwright.plan.job_tree import Int64Array
from batchwright.plan.length_predictor import Lengths, Rows
from batchwright.request import Int32Array

INSTRUCTION = (
    "\n\nBefore answering: how many words will the whole answer have? Reply with one number only.\n"
)
MAX_ANSWER_TOKENS = 8
TOKENS_PER_WORD = 4 / 3

MOST_TOLD = 8192
"""Rows whose numbers are remembered, the latest: more than an engine has at once."""


class Predictor:
    """What the model said, and all that a row may have where it said nothing of use."""

    def __init__(self) -> None:
        self._told: dict[bytes, float] = {}

    def tell(self, prompt: Int32Array, answer: str) -> bool:
        """The model's answer about a prompt; False: there is no number in it."""
        found = re.search(r"\d{1,6}", answer)
        if found is None:
            return False
        if len(self._told) >= MOST_TOLD:
            del self._told[next(iter(self._told))]
        self._told[prompt.tobytes()] = max(1.0, int(found[0]) * TOKENS_PER_WORD)
        return True

    def learn(self, rows: Rows, output: Int64Array) -> None:
        """Nothing to learn."""

    def predict(self, rows: Rows, so_far: Int64Array) -> Lengths:
        """As told."""
        pairs = zip(rows.prompts, rows.most.tolist(), strict=True)
        told = np.array([self._told.get(prompt.tobytes(), most) for prompt, most in pairs])
        return Lengths(told, told)
