"""Chunks of equal time: the published ladder."""

from __future__ import annotations

from benchmarks.reproductions.chunk_ladder import (
    BLOCK,
    FIRST,
    KIMI,
    LEAST,
    PROMPT,
    PUBLISHED,
    ladder,
)


def test_golden_ladder() -> None:
    assert int(KIMI.of(0, FIRST)) == 572
    assert list(ladder(KIMI, PROMPT, first=FIRST, least=LEAST, block=BLOCK)) == PUBLISHED
    assert sum(PUBLISHED) == PROMPT


def test_chunks_take_the_same_time_but_for_the_last() -> None:
    goal, before = KIMI.of(0, FIRST), 0
    for size in PUBLISHED[:-1]:
        assert KIMI.of(before, size) <= goal + 1e-9 < KIMI.of(before, size + BLOCK)
        before += size
