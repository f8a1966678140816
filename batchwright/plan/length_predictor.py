"""How long outputs will be: the seam between those who guess and those who plan by it.

Every file of `plan/lengths/` holds one class `Predictor`. It is told of rows that have ended, and
asked about rows that wait or run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from batchwright.plan.job_tree import Float64Array, Int64Array
from batchwright.request import Int32Array
from batchwright.techniques import find


class Rows(NamedTuple):
    """What a predictor knows of rows.

    Attributes:
        prompts: [num_rows] token ids.
        most: [num_rows] int64, output tokens that each may have.
    """

    prompts: Sequence[Int32Array]
    most: Int64Array


class Lengths(NamedTuple):
    """Output tokens of rows, each [num_rows] float64.

    Attributes:
        mean: as many as are expected; orders and estimates go by it.
        upper: as many as memory is kept for; no guarantee, a row that has more is not hurt.
    """

    mean: Float64Array
    upper: Float64Array


class LengthPredictor(Protocol):
    """Guesses output lengths. What it returns may be more than a row may have, or less than it has
    already; who asks puts that right."""

    def learn(self, rows: Rows, output: Int64Array) -> None:
        """Rows have ended with `output` [num_rows] tokens."""
        ...

    def predict(self, rows: Rows, so_far: Int64Array) -> Lengths:
        """Guess.

        Args:
            so_far: [num_rows] int64, output tokens of rows that run; 0 for rows that wait.
        """
        ...


def find_predictor(name: str) -> LengthPredictor:
    """A new predictor of a file of `plan/lengths`.

    Raises:
        ConfigError: there is no such file.
    """
    predictor: LengthPredictor = find("plan.lengths", name).Predictor()
    return predictor


def within_limits(lengths: Lengths, least: Int64Array, most: Int64Array) -> Lengths:
    """Lengths between the fewest and the most tokens that rows may have; upper not below mean."""
    mean = np.clip(lengths.mean, least, most)
    return Lengths(mean, np.clip(lengths.upper, mean, most))
