"""Chunks of equal time: the sizes in which a prompt of 128K tokens is computed by a pipeline.

A chunk of x tokens behind L takes t(L, x) = c + g L + a (2 L x + x^2) + b x. Attention makes later
chunks dearer, and stages of a pipeline wait for each other, so each chunk is made as long as the
first one takes, in whole blocks (Qwen2.5-1M's inference framework, arXiv:2501.15383; coefficients
and sizes as ROCm's ATOM documents them for Kimi-K2.5 on MI355X). The engine here has no pipeline
and needs no such chunks; this checks the formula, and says what they would be worth if it did.

    python -m benchmarks.reproductions.chunk_ladder
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.reproductions.tables import Line, show_and_keep


class ChunkTime(NamedTuple):
    """Milliseconds of a chunk: fixed, for each token before it, for each pair, for each token."""

    fixed: float
    before: float
    pair: float
    token: float

    def of(self, before: int, size: int) -> float:
        """t(L, x)."""
        pairs = 2 * before * size + size**2
        return self.fixed + self.before * before + self.pair * pairs + self.token * size


KIMI = ChunkTime(fixed=26.1, before=5.39e-4, pair=3.25e-7, token=6.03e-3)
FIRST, LEAST, BLOCK, PROMPT = 32_768, 4_096, 64, 131_072
PUBLISHED = [32768, 16192, 12416, 10368, 9088, 8192, 7488, 6912, 6464, 6080, 5760, 5504, 3840]


def ladder(time: ChunkTime, prompt: int, *, first: int, least: int, block: int) -> Iterator[int]:
    """Sizes of the chunks of a prompt, each taking as long as the first, in whole blocks.

    Args:
        least: no chunk is smaller, but the last.
    """
    goal, before = time.of(0, first), 0
    while before < prompt:
        slope = time.token + 2 * time.pair * before
        rest = goal - time.fixed - time.before * before
        room = max(slope**2 + 4 * time.pair * rest, 0.0)
        size = int((math.sqrt(room) - slope) / (2 * time.pair)) // block * block
        size = min(max(size, least), first, prompt - before)
        yield size
        before += size


def main() -> None:
    """Compare the ladder with the published one."""
    sizes = list(ladder(KIMI, PROMPT, first=FIRST, least=LEAST, block=BLOCK))
    lines = [
        Line("time of the first chunk, ms", 572, KIMI.of(0, FIRST)),
        Line("chunks", 13, len(sizes)),
    ]
    lines += [
        Line(f"chunk {index + 1}, tokens", published, size)
        for index, (published, size) in enumerate(zip(PUBLISHED, sizes, strict=True))
    ]
    before = [sum(sizes[:index]) for index in range(len(sizes))]
    times = [KIMI.of(start, size) for start, size in zip(before, sizes, strict=True)]
    lines.append(Line("longest chunk / first", None, max(times) / times[0]))
    lines.append(
        Line("last fixed chunk of 32,768 / first", None, KIMI.of(3 * FIRST, FIRST) / times[0])
    )
    show_and_keep(
        "chunk-ladder",
        lines,
        ["coefficients as published; blocks of 64 tokens, by which the published sizes divide"],
        sizes=sizes,
    )


if __name__ == "__main__":
    main()
