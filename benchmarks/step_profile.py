"""Where a decode step's time goes, with 1, 8, 64 and 256 rows.

    python -m benchmarks.step_profile [--threads 2] [--steps 40] [--out JSON] [--picture SVG]

Rows of 16 prompt tokens, all different, greedy, SmolLM2; seconds of the parts as `batchwright
bench` tells them apart, divided by steps, the quickest of three runs. With `--before JSON`, of an
earlier run of another version, the picture shows both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from batchwright import LLM, SamplingParams
from batchwright.bench.profile import Profile
from benchmarks.machine import describe_machine

ROWS = (1, 8, 64, 256)
PROMPT_TOKENS = 16
RUNS = 3
COLOURS = ("#4c78a8", "#72b7b2", "#f58518", "#e45756", "#b279a2", "#9d9da1")
HEIGHT, BAR, LEFT, WIDTH = 26, 18, 130, 620


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    llm = LLM("smollm2", num_threads=options.threads, max_num_seqs=max(ROWS))
    profile = Profile(llm)
    steps = {str(rows): _profile(llm, profile, rows, options.steps) for rows in ROWS}
    for rows, parts in steps.items():
        total = sum(parts.values())
        shares = ", ".join(f"{part} {1e3 * seconds:.2f}" for part, seconds in parts.items())
        print(f"{rows:>4} rows: {1e3 * total:.2f} ms a step; {shares}")
    result = {"machine": describe_machine(), "threads": options.threads, "steps": steps}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        before = json.loads(options.before.read_text())["steps"] if options.before else {}
        options.picture.write_text(_picture(before, steps))


def _profile(llm: LLM, profile: Profile, rows: int, num_steps: int) -> dict[str, float]:
    """Seconds of a step by part."""
    ids = np.random.default_rng(rows).integers(100, 40_000, (rows, PROMPT_TOKENS)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=num_steps, ignore_eos=True)
    runs = []
    for _ in range(RUNS):
        profile.clear()
        start = time.perf_counter()
        llm.generate(ids, params)
        runs.append(profile.of(time.perf_counter() - start))
    quickest = min(runs, key=lambda parts: sum(parts.values()))
    return {part: seconds / num_steps for part, seconds in quickest.items()}


def _picture(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Stacked bars, before and after, each pair to the scale of its longest."""
    lines, y = [], 30
    for i, part in enumerate(next(iter(after.values()))):
        x = LEFT + 105 * i
        lines.append(f'<rect x="{x}" y="6" width="12" height="12" fill="{COLOURS[i]}"/>')
        lines.append(f'<text x="{x + 16}" y="16">{part}</text>')
    for rows, now in after.items():
        pair = [("before", before[rows]), ("after", now)] if rows in before else [("", now)]
        longest = max(sum(parts.values()) for _, parts in pair)
        for name, parts in pair:
            total, x = sum(parts.values()), float(LEFT)
            lines.append(f'<text x="4" y="{y + 13}">{rows} rows {name}</text>')
            for i, seconds in enumerate(parts.values()):
                width = WIDTH * seconds / longest
                lines.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" '
                    f'fill="{COLOURS[i]}"/>'
                )
                x += width
            lines.append(f'<text x="{x + 5:.1f}" y="{y + 13}">{1e3 * total:.1f} ms</text>')
            y += HEIGHT
        y += 8
    size = f'width="{LEFT + WIDTH + 80}" height="{y}"'
    style = 'font-family="sans-serif" font-size="12"'
    body = "\n".join(lines)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


if __name__ == "__main__":
    main()
