"""page: the report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from batchwright.report import amounts
from batchwright.report.figures import draw_figures
from batchwright.report.numbers import Report

PART_MEANINGS = {
    "load": "loading the model",
    "compile": "compiling kernels, once on a machine",
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
    figures = {name: Markup(svg) for name, svg in draw_figures(report).items()}
    return fill_page("page.html", report=report, figures=figures, parts=PART_MEANINGS)


def fill_page(template: str, **values: Any) -> str:
    """A page from a template of this folder, with the style that all have."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters.update(_FILTERS)
    folder = files("batchwright.report")
    source = folder.joinpath(template).read_text(encoding="utf-8")
    style = Markup(folder.joinpath("page.css").read_text(encoding="utf-8"))
    return environment.from_string(source).render(style=style, **values)


_FILTERS: Mapping[str, Callable[[Any], str]] = {
    "count": amounts.count,
    "percent": amounts.percent,
    "seconds": amounts.seconds,
    "duration": amounts.duration,
    "moment": amounts.moment,
    "memory": amounts.memory,
    "flops": amounts.flops,
    "outcome": lambda outcome: _OUTCOMES.get(outcome, "an error"),
}
