"""Readable twin of numba.py: the same answers from Python lists, for tests."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from batchwright.request import Int32Array


def sort_prompts(
    tokens: Int32Array, offsets: np.ndarray, groups: np.ndarray
) -> tuple[Int32Array, Int32Array]:
    """See numba.sort_prompts."""
    prompts = [tokens[start:end].tolist() for start, end in pairwise(offsets)]
    rows = sorted(range(len(prompts)), key=lambda row: (groups[row], prompts[row]))
    shared = [0] * len(rows)
    for index in range(1, len(rows)):
        before, row = rows[index - 1], rows[index]
        if groups[before] == groups[row]:
            shared[index] = _num_shared(prompts[before], prompts[row])
    return np.array(rows, np.int32), np.array(shared, np.int32)


def _num_shared(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(a), len(b)))
