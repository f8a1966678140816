"""Python looks for garbage less often while a job runs, and as before afterwards."""

import gc

import pytest

from batchwright.job.collector import OBJECTS_BETWEEN_COLLECTIONS, rare_collections


@pytest.mark.parametrize(
    ("usual", "inside"),
    [
        ((700, 10, 10), (OBJECTS_BETWEEN_COLLECTIONS, 10, 10)),
        ((90_000, 5, 5), (90_000, 5, 5)),  # someone has made it rarer
        ((0, 10, 10), (0, 10, 10)),  # someone has turned it off
    ],
)
def test_the_usual_threshold_comes_back(
    usual: tuple[int, int, int], inside: tuple[int, int, int]
) -> None:
    before = gc.get_threshold()
    gc.set_threshold(*usual)
    try:
        with rare_collections():
            assert gc.get_threshold() == inside
        assert gc.get_threshold() == usual
    finally:
        gc.set_threshold(*before)
