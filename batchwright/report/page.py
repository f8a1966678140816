"""page: the report as one HTML file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from batchwright.report.figures import draw_figures
from batchwright.report.numbers import Report

PART_MEANINGS = {
    "load": "loading the model",
    "prefill": "steps: computing prompts",
    "decode": "steps: generating tokens",
    "tail": "steps at the end, when too few rows were left to fill the machine",
    "idle": "nothing to run; waiting for input",
    "write": "making answers, committing them, writing files",
    "other": "taking rows in, and the rest",
}
_OUTCOMES = {"end": "its end", "stop": "a stop", "error": "an error", None: "no end in the log"}


def render_page(report: Report) -> str:
    """The page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters.update(_FILTERS)
    source = files("batchwright.report").joinpath("page.html").read_text(encoding="utf-8")
    figures = {name: Markup(svg) for name, svg in draw_figures(report).items()}
    return environment.from_string(source).render(
        report=report, figures=figures, parts=PART_MEANINGS
    )


def _count(value: float) -> str:
    return f"{value:,.1f}" if 0 < value < 10 and value != round(value) else f"{value:,.0f}"


def _percent(fraction: float | None) -> str:
    if fraction is None:
        return "–"
    return f"{fraction:.1%}" if 0 < fraction < 0.1 else f"{fraction:.0%}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds < 10 else f"{seconds:,.1f} s"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _bytes(value: float) -> str:
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.0f} MB"


def _flops(value: float) -> str:
    """With the prefix of its unit: 3.2 T."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:,.1f} {prefix}"
    return f"{value / 1e6:,.1f} M"


_FILTERS: Mapping[str, Callable[[Any], str]] = {
    "count": _count,
    "percent": _percent,
    "seconds": _seconds,
    "duration": _duration,
    "moment": _moment,
    "bytes": _bytes,
    "flops": _flops,
    "outcome": lambda outcome: _OUTCOMES.get(outcome, "an error"),
}
