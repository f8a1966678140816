"""Figures: the pictures of a report, as SVG elements for the page.

Colours are CSS variables of the page, so that one picture serves light and dark; text is text in
the page's font. Needs matplotlib (extra `report`).
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from batchwright.errors import ConfigError
from batchwright.report.numbers import PARTS, Report

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


def draw_figures(report: Report) -> dict[str, str]:
    """SVG elements by name: time, over_time, lengths, tokens, and ceiling if it is known.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pictures: dict[str, tuple[float, Callable[[Figure, Report], None], str]] = {
        "time": (1.0, _draw_time, "Where the time went"),
        "over_time": (7.0, _draw_over_time, "The job over time"),
        "lengths": (2.2, _draw_lengths, "Lengths of prompts and outputs"),
        "tokens": (1.7, _draw_tokens, "Tokens computed and saved"),
    }
    if report.roofline is not None:
        pictures["ceiling"] = (1.4, _draw_ceiling, "Time spent and the least possible")
    return {
        name: draw_picture(name, height, partial(_draw, draw, report), title)
        for name, (height, draw, title) in pictures.items()
    }


def _draw(draw: Callable[[Figure, Report], None], report: Report, figure: Figure) -> None:
    draw(figure, report)


def need_matplotlib() -> None:
    """Say how to get it if it is missing.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "pictures need matplotlib: pip install 'batchwright[report]' (or --json, which needs "
            "nothing)"
        )


def draw_picture(name: str, height: float, draw: Callable[[Figure], None], title: str) -> str:
    """One SVG element for a page.

    Args:
        name: no other picture of the page has it.
        height: in inches; pictures are 9 wide before they are scaled to the page.
        title: for those who cannot see it.
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


def _draw_time(figure: Figure, report: Report) -> None:
    axes = figure.subplots()
    total, left = report.times.total_s or 1.0, 0.0
    for part in PARTS:
        share = getattr(report.times, f"{part}_s") / total
        axes.barh(0, share, left=left, color=COLOURS[part], height=0.9)
        if share >= 0.07:
            label = f"{part}\n{share:.0%}"
            axes.text(left + share / 2, 0, label, ha="center", va="center", color="white")
        left += share
    axes.set_xlim(0, 1)
    axes.axis("off")


def _draw_over_time(figure: Figure, report: Report) -> None:
    panels = figure.subplots(5, 1, sharex=True, height_ratios=(1, 1, 1, 1, 0.8))
    found = report.intervals
    if not found:
        return
    edges = [found[0].start_s, *(interval.end_s for interval in found)]
    prompts, outputs, parts, rows, memory = panels
    _steps(prompts, edges, (i.prompt_tokens_per_s for i in found), "prefill")
    prompts.set_title("Prompt tokens computed per second")
    _steps(outputs, edges, (i.output_tokens_per_s for i in found), "decode")
    outputs.set_title("Tokens generated per second")
    _draw_parts(parts, edges, report)
    _draw_rows(rows, edges, report)
    _steps(memory, edges, (100 * i.kv_used_fraction for i in found), "saved")
    memory.set_title("Memory for keys and values in use, %")
    memory.set_xlabel("seconds of the job's runs")
    for axes in panels:
        _mark_runs_and_tails(axes, report)
        axes.set_xlim(0, edges[-1])
        axes.set_ylim(bottom=0)
    for start_s, end_s in report.tails:
        if end_s - start_s > 0.03 * edges[-1]:
            top = panels[0].get_ylim()[1]
            panels[0].text((start_s + end_s) / 2, top, "tail", ha="center", va="bottom")


def _steps(axes: Axes, edges: list[float], values: Iterable[float], colour: str) -> None:
    axes.stairs(list(values), edges, fill=True, color=COLOURS[colour])


def _draw_parts(axes: Axes, edges: list[float], report: Report) -> None:
    """How each second was spent, in percent, one part on top of the other."""
    below = [0.0] * len(report.intervals)
    for part in ("prefill", "decode", "idle", "write", "load", "compile", "other"):
        above = [
            start + 100 * interval.seconds.get(part, 0.0) / (interval.end_s - interval.start_s)
            for start, interval in zip(below, report.intervals, strict=True)
        ]
        axes.stairs(
            above, edges, baseline=below, fill=True, color=COLOURS[part], linewidth=0, label=part
        )
        below = above
    axes.set_ylim(0, 100)
    axes.set_title("Where each second went, %")


def _draw_rows(axes: Axes, edges: list[float], report: Report) -> None:
    running = [interval.running for interval in report.intervals]
    _steps(axes, edges, running, "decode")
    axes.set_title("Sequences running")
    most = report.settings.get("max_num_seqs")
    if isinstance(most, int) and max(running) > most / 2:
        axes.axhline(most, color=COLOURS["faint"], linewidth=1, linestyle="--")


def _mark_runs_and_tails(axes: Axes, report: Report) -> None:
    for start_s, end_s in report.tails:
        axes.axvspan(start_s, end_s, color=COLOURS["tail"], alpha=0.18, linewidth=0)
    for before, after in zip(report.intervals, report.intervals[1:], strict=False):
        if before.run != after.run:
            axes.axvline(after.start_s, color=COLOURS["ink"], linewidth=1, linestyle=":")


def _draw_lengths(figure: Figure, report: Report) -> None:
    tokens = report.tokens
    for axes, counts, colour, title in zip(
        figure.subplots(1, 2),
        (tokens.prompt_lengths, tokens.output_lengths),
        ("prefill", "decode"),
        ("Prompts by length in tokens", "Outputs by length in tokens"),
        strict=True,
    ):
        first = next((bits for bits, count in enumerate(counts) if count), 0)
        shown = counts[first:]
        axes.bar(range(len(shown)), shown, color=COLOURS[colour], width=0.92)
        labels = [_bucket(first + index) for index in range(len(shown))]
        axes.set_xticks(range(len(shown)), labels, fontsize=8)
        axes.grid(visible=False, axis="x")
        axes.set_title(title)


def _bucket(bits: int) -> str:
    """The lengths of so many bits: 0, 1, 2-3, 4-7, ..."""
    if bits < 2:
        return str(bits)
    low, high = 2 ** (bits - 1), 2**bits - 1
    return f"{low}-{high}" if high < 1024 else f"{low // 1024}K-"


def _draw_tokens(figure: Figure, report: Report) -> None:
    tokens = report.tokens
    bars = [
        ("prompt tokens saved by sharing", tokens.cached, "saved"),
        ("prompt tokens computed", tokens.computed_prompt, "prefill"),
        ("tokens generated", tokens.generated, "decode"),
        ("computed again", tokens.recomputed, "again"),
    ]
    draw_bars(figure.subplots(), bars, lambda value: f"{value:,.0f}")


def _draw_ceiling(figure: Figure, report: Report) -> None:
    assert report.roofline is not None
    bars = [
        ("least possible", report.roofline.least_s, "saved"),
        ("steps", report.roofline.step_s, "decode"),
        ("all time", report.roofline.total_s, "other"),
    ]
    draw_bars(figure.subplots(), bars, lambda value: f"{value:,.1f} s")


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
