"""What every reproduction prints and keeps: paper value, our value, deviation, what was assumed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe_commit, describe_machine, describe_versions

RESULTS = Path(__file__).parent.parent / "results"


class Line(NamedTuple):
    """One value.

    Attributes:
        paper: None if the paper has none.
        is_calibration: constants were set so that this one agrees; it proves nothing.
        note: what the paper's value is, if it is not what ours is.
    """

    name: str
    paper: float | None
    ours: float
    is_calibration: bool = False
    note: str = ""


def show_and_keep(name: str, lines: list[Line], assumptions: list[str], **more: Any) -> None:
    """Print a table; with --keep, write it to benchmarks/results."""
    parser = argparse.ArgumentParser(description=f"Reproduction: {name}")
    parser.add_argument("--keep", metavar="DATE", help="Write DATE-reproduction-NAME.json.")
    arguments = parser.parse_args()
    width = max(len(line.name) for line in lines) + 2
    print(f"{'':{width}}{'paper':>10}{'ours':>10}{'deviation':>11}")
    for line in lines:
        paper = "-" if line.paper is None else f"{line.paper:.4g}"
        off = "" if line.paper is None else f"{line.ours / line.paper - 1:+.0%}"
        off = "calibrated" if line.is_calibration else off
        print(f"{line.name:{width}}{paper:>10}{line.ours:>10.4g}{off:>11}  {line.note}")
    print("\nAssumptions")
    for assumption in assumptions:
        print(f"- {assumption}")
    if arguments.keep:
        path = RESULTS / f"{arguments.keep}-reproduction-{name}.json"
        values = {
            "benchmark": f"benchmarks.reproductions.{name}",
            "lines": [line._asdict() for line in lines],
            "assumptions": assumptions,
            **more,
            "machine": describe_machine(),
            "versions": describe_versions("numpy"),
            "commit": describe_commit(),
        }
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        print(f"\nkept as {path.name}")
