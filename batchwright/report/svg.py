"""SVG elements for a page, drawn by matplotlib (extra `report`).

Colours are CSS variables of the page, so that one picture serves light and dark; text is text in
the page's font.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from batchwright.errors import ConfigError
from batchwright.report.numbers import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib draws in these colours; each is then replaced by the CSS variable of its name.
COLOURS = {
    name: f"#0{index:x}0b0c"
    for index, name in enumerate((*PARTS, "ink", "faint", "grid", "saved", "again"))
}
_WIDTH = 9.0  # inches; pictures are scaled to the page
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "batchwright",
    "font.size": 10,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["faint"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["faint"],
    "ytick.labelcolor": COLOURS["faint"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def need_matplotlib() -> None:
    """Say how to get it if it is missing.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "a report's pictures need matplotlib: pip install 'batchwright[report]' (or --json, "
            "which needs nothing)"
        )


def svg(name: str, height: float, draw: Callable[[Figure], None], title: str) -> str:
    """A picture as an SVG element.

    Args:
        name: unique on the page.
        height: inches, for a width of 9.
        title: what it shows, for those who cannot see it.
    Raises:
        ConfigError: matplotlib is not installed.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    return _for_page(file.getvalue(), name, title)


def _for_page(svg: str, name: str, title: str) -> str:
    """An SVG file as an element of a page: no outside names, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\bid=\"", f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, code in COLOURS.items():
        svg = svg.replace(code, f"var(--{colour})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def draw_bars(
    axes: Axes, bars: Sequence[tuple[str, float, str]], form: Callable[[float], str]
) -> None:
    """Horizontal bars from top to bottom, each with its value beside it."""
    names = [name for name, _, _ in bars]
    values: list[Any] = [value for _, value, _ in bars]
    drawn = axes.barh(names, values, color=[COLOURS[c] for _, _, c in bars], height=0.75)
    axes.bar_label(drawn, [form(value) for value in values], padding=4)
    axes.set_xlim(0, 1.15 * (max(values) or 1))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
