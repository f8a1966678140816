"""Section `tune`: would another tile shape, or other pieces, be faster? Not for everyday runs.

Tries tile shapes one change at a time around those of tiling.py, and numbers of pieces, on steps
that stand for many. What it finds is put into tiling.py and work_list.py by hand.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch

from batchwright.kernels.paged_attention.tiling import TileShape, Tiling
from benchmarks.gpu.attention import TINY
from benchmarks.gpu.attention_speed import Heads, Pool, Work, usual_tiling
from benchmarks.gpu.card import Budget, Timer

STEPS = {
    "narrow": [Work(64, 2047), Work(256, 1023), Work(8, 16383)],
    "wide": [Work(1, 0, 4096), Work(1, 16384, 512), Work(64, 8192 + 63, 1, 8192)],
}
NARROW = [
    TileShape(16, keys, warps, stages)
    for keys, warps, stages in product((32, 64, 128), (2, 4), (3, 5, 7))
]
WIDE = [
    *(TileShape(128, keys, 8, stages) for keys, stages in product((32, 64, 128), (1, 3, 5))),
    *(TileShape(64, keys, 4, stages) for keys, stages in product((32, 64, 128), (1, 3, 5))),
    *(TileShape(128, keys, 4, 3) for keys in (32, 64, 128)),
]
PROGRAMS = (0, 2, 4, 16, 32)


def run(timer: Timer, budget: Budget) -> dict[str, Any]:
    """Microseconds of every shape on every step; None where the card lacks the shared memory."""
    heads, num_tokens, dtype, steps = Heads(), 600_000, torch.bfloat16, STEPS
    shapes = {"narrow": NARROW, "wide": WIDE}
    programs: tuple[int, ...] = PROGRAMS
    if timer.device == "cpu":  # dry run
        heads, num_tokens, dtype, programs = TINY, 3000, torch.float32, (0,)
        steps = {"narrow": [Work(2, 12)], "wide": [Work(1, 0, 9)]}
        shapes = {"narrow": [TileShape(16, 16, 4, 2)], "wide": [TileShape(16, 32, 4, 2)]}
    pool = Pool(timer.device, num_tokens, heads, dtype)
    usual = usual_tiling(heads, pool.k.element_size(), timer.device)
    lines: list[dict[str, Any]] = []
    left_out = 0
    trials: list[tuple[str, Tiling, int]] = []
    for kind in ("narrow", "wide"):
        trials += [(kind, usual, number) for number in (8, *programs)]
        trials += [(kind, replace(usual, **{kind: shape}), 8) for shape in shapes[kind]]
    for kind, tiling, number in trials:
        if budget.is_spent():
            left_out += 1
            continue
        line: dict[str, Any] = {
            "kind": kind,
            "shape": str(tiling.narrow if kind == "narrow" else tiling.wide),
            "programs_per_multiprocessor": number,
        }
        for work in steps[kind]:
            line[_name(work)] = _microseconds(timer, pool, work, tiling, number)
        lines.append(line)
    return {"lines": lines, "left_out": left_out}


def _name(work: Work) -> str:
    shared = f", {work.shared} shared" if work.shared else ""
    return f"{work.num_rows} x {work.num_new} at {work.context}{shared}"


def _microseconds(
    timer: Timer, pool: Pool, work: Work, tiling: Tiling, number: int
) -> float | None:
    try:
        calls = pool.paged_calls(work, tiling=tiling, programs_per_multiprocessor=number)
        return timer.seconds(calls)[0] * 1e6
    except Exception as error:  # the compiler's own kinds of error differ between versions
        if "out of resource" not in str(error):
            raise
        return None


def table(found: dict[str, Any]) -> str:
    """One line per trial."""
    lines = []
    for line in found["lines"]:
        times = [
            f"{name}: {value:.1f} us" if value is not None else f"{name}: too large"
            for name, value in line.items()
            if name not in ("kind", "shape", "programs_per_multiprocessor")
        ]
        lines.append(
            f"{line['kind']:7}{line['shape']} x{line['programs_per_multiprocessor']:<3}"
            f"{'; '.join(times)}"
        )
    return "\n".join([*lines, f"left out: {found['left_out']}"])
