"""Order figures: one job in several orders over time, one line per order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from batchwright.order_runs import Course, OrderRun
from batchwright.report.figures import COLOURS, draw_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE_COLOURS = ("prefill", "decode", "saved", "tail", "again", "write", "idle", "load")

PANELS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "throughput": (
        "Throughput over time",
        (
            ("Prompt tokens computed per second", "prompt_tokens_per_s"),
            ("Output tokens computed per second", "output_tokens_per_s"),
        ),
    ),
    "machine": (
        "Compute and memory bandwidth over time",
        (
            ("FLOPs, % of the machine's best product", "compute_use"),
            ("Memory traffic, % of plain reading", "bandwidth_use"),
        ),
    ),
    "memory": (
        "Memory for keys and values over time",
        (("Blocks in use, %", "kv_use"), ("Sequences running", "num_running")),
    ),
}


def order_colour(index: int) -> str:
    """The page's name of the colour of the index-th order."""
    return LINE_COLOURS[index % len(LINE_COLOURS)]


def draw_orders(runs: Sequence[OrderRun]) -> dict[str, str]:
    """SVG elements by name: throughput, machine, memory.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    return {
        name: draw_picture(name, 3.4, partial(_draw_panels, runs=runs, panels=panels), title)
        for name, (title, panels) in PANELS.items()
    }


def _draw_panels(
    figure: Figure, *, runs: Sequence[OrderRun], panels: tuple[tuple[str, str], ...]
) -> None:
    longest = max(run.seconds for run in runs)
    all_axes = figure.subplots(len(panels), 1, sharex=True)
    for axes, (title, field) in zip(all_axes, panels, strict=True):
        for index, run in enumerate(runs):
            times, values = _line(run.course, field)
            colour = COLOURS[order_colour(index)]
            axes.plot(times, values, color=colour, linewidth=1.3, label=run.order)
        axes.set_title(title)
        axes.set_xlim(0, longest)
        axes.set_ylim(bottom=0)
    all_axes[-1].set_xlabel("seconds")


def _line(course: Course, field: str) -> tuple[list[float], list[float]]:
    """Middles of the intervals, and the values there; shares in percent."""
    values: list[float] = getattr(course, field)
    factor = 100 if field.endswith("_use") else 1
    times = [(index + 0.5) * course.interval_s for index in range(len(values))]
    return times, [factor * value for value in values]
