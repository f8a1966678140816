"""Section `tune`: would another tile shape, or other pieces, be faster? Not for everyday runs.

Tries tile shapes near those of tiling.py, each with several numbers of programs for the pieces, on
steps that stand for many. What it finds is put into tiling.py and work_list.py by hand. The first
line of each kind is what those files hold.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch

from batchwright.kernels.paged_attention.tiling import TileShape, Tiling
from batchwright.kernels.paged_attention.work_list import PROGRAMS_PER_MULTIPROCESSOR
from benchmarks.gpu.attention import TINY
from benchmarks.gpu.attention_speed import Heads, Pool, Work, usual_tiling
from benchmarks.gpu.card import Budget, Timer

STEPS = {
    "narrow": [Work(64, 2047), Work(256, 1023), Work(16, 1023), Work(8, 16383)],
    "wide": [
        Work(1, 0, 512), Work(1, 0, 2048), Work(1, 0, 4096), Work(1, 16384, 512),
        Work(16, 1024, 128), Work(64, 8192 + 63, 1, 8192),
    ],
}  # fmt: skip
TRIALS = {
    "narrow": [
        *product([TileShape(16, 64, 2, 3)], (8, 2, 4, 12)),
        (TileShape(16, 64, 2, 2), 8),
    ],
    "wide": list(
        product(
            [
                *(TileShape(64, 64, 4, stages) for stages in (5, 4, 7)),
                *(TileShape(64, 32, 4, stages) for stages in (5, 7)),
                TileShape(128, 64, 4, 5),
                TileShape(128, 32, 4, 5),
            ],
            (2, 1, 3, 4),
        )
    ),
}
"""(shape, programs per multiprocessor); 4 stages of narrow and 6 of wide compile to 3 and 5."""

EIGHT_BIT_TRIALS = {
    "narrow": [
        (TileShape(16, num_keys, num_warps, stages), 8)
        for num_warps in (1, 2, 4)
        for num_keys, stages in ((64, 3), (32, 4))
    ],
    "wide": [
        *((TileShape(64, 64, 4, stages), 2) for stages in (5, 3, 2)),
        (TileShape(64, 64, 8, 3), 2),
    ],
}
"""With keys and values in 8 bits."""


def run(timer: Timer, budget: Budget) -> dict[str, Any]:
    """Microseconds of every shape on every step; None where the card lacks the shared memory."""
    heads, num_tokens, dtype, steps, trials = Heads(), 600_000, torch.bfloat16, STEPS, TRIALS
    if timer.device == "cpu":  # dry run
        heads, num_tokens, dtype = TINY, 3000, torch.float32
        steps = {"narrow": [Work(2, 12)], "wide": [Work(1, 0, 9)]}
        trials = {"narrow": [(TileShape(16, 16, 4, 2), 2)], "wide": [(TileShape(16, 32, 4, 2), 2)]}
    lines: list[dict[str, Any]] = []
    left_out = 0
    numbers = dict(zip(("narrow", "wide"), PROGRAMS_PER_MULTIPROCESSOR, strict=True))
    for keys in ("auto", "fp8", "int8"):
        pool = Pool(timer.device, num_tokens, heads, dtype, kv_cache_dtype=keys)
        usual = usual_tiling(heads, dtype.itemsize, timer.device, kv_cache_dtype=keys)
        todo = [(kind, *trial) for kind, tried in trials.items() for trial in tried]
        for kind, shape, number in todo:
            if budget.is_spent():
                left_out += 1
                continue
            tiling = replace(usual, **{kind: shape})
            changed = numbers | {kind: number}
            programs = changed["narrow"], changed["wide"]
            line: dict[str, Any] = {
                "kind": kind,
                "keys": keys,
                "shape": str(shape),
                "programs_per_multiprocessor": number,
            }
            for work in steps[kind]:
                line[_name(work)] = _microseconds(timer, pool, work, tiling, programs)
            lines.append(line)
        trials = trials if timer.device == "cpu" else EIGHT_BIT_TRIALS
        del pool
    return {"lines": lines, "left_out": left_out}


def _name(work: Work) -> str:
    shared = f", {work.shared} shared" if work.shared else ""
    return f"{work.num_rows} x {work.num_new} at {work.context}{shared}"


def _microseconds(
    timer: Timer, pool: Pool, work: Work, tiling: Tiling, programs: tuple[int, int]
) -> float | None:
    try:
        calls = pool.paged_calls(work, tiling=tiling, programs_per_multiprocessor=programs)
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
            if name not in ("kind", "keys", "shape", "programs_per_multiprocessor")
        ]
        number = line["programs_per_multiprocessor"]
        lines.append(
            f"{line['kind']:7}{line['keys']:5}{line['shape']} x{number:<3}{'; '.join(times)}"
        )
    return "\n".join([*lines, f"left out: {found['left_out']}"])
