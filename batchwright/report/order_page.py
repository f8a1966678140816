"""order_page: simulated runs of one job in several orders, as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from batchwright.order_runs import OrderRun
from batchwright.report.order_figures import draw_orders, order_colour
from batchwright.report.page import fill_page


def render_orders(title: str, facts: Mapping[str, str], runs: Sequence[OrderRun]) -> str:
    """The page.

    Args:
        title: what was simulated.
        facts: of the job, the model and the machine, by name.
        runs: at least one.
    Raises:
        ConfigError: matplotlib is not installed.
    """
    figures = {name: Markup(svg) for name, svg in draw_orders(runs).items()}
    lines = [(order_colour(index), run) for index, run in enumerate(runs)]
    best_s = min(run.seconds for run in runs)
    return fill_page(
        "orders.html", title=title, facts=facts, lines=lines, figures=figures, best_s=best_s
    )
