"""The repetition stop against the definition, read literally."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.repetition import RepetitionChecker, RepetitionDetection


def is_a_loop(tokens: list[int], detection: RepetitionDetection) -> bool:
    """The last tokens are one pattern, min_count times."""
    for size in range(detection.min_pattern_size, detection.max_pattern_size + 1):
        length = size * detection.min_count
        if len(tokens) >= length and tokens[-length:] == tokens[-size:] * detection.min_count:
            return True
    return False


@given(
    tokens=st.lists(st.integers(0, 2), max_size=60),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)).map(sorted),
    min_count=st.integers(2, 4),
    min_tokens=st.integers(0, 20),
)
def test_as_defined(tokens: list[int], sizes: list[int], min_count: int, min_tokens: int) -> None:
    detection = RepetitionDetection(
        min_pattern_size=sizes[0], max_pattern_size=sizes[1], min_count=min_count
    )
    checker = RepetitionChecker(detection, min_tokens)
    for end, token_id in enumerate(tokens, start=1):
        expected = end >= min_tokens and is_a_loop(tokens[:end], detection)
        assert checker.append(token_id) == expected


def test_a_wide_pattern_beyond_the_buffer() -> None:
    detection = RepetitionDetection(max_pattern_size=300, min_count=3)
    checker = RepetitionChecker(detection)
    noise = np.random.default_rng(0).permutation(1000).tolist()
    pattern = noise[:257]
    found = [checker.append(token) for token in [*noise, *pattern, *pattern, *pattern]]
    assert found.index(True) == len(found) - 1


@pytest.mark.parametrize("token_id", [0, 7])
def test_what_was_not_there_yet_equals_nothing(token_id: int) -> None:
    checker = RepetitionChecker(RepetitionDetection(max_pattern_size=4, min_count=4))
    assert [checker.append(token_id) for _ in range(4)] == [False, False, False, True]
