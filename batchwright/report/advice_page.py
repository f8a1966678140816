"""advice_page: advice as one HTML file that needs nothing else."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from markupsafe import Markup

from batchwright.job.advice import Advice, DeviceAdvice, QueueAdvice
from batchwright.job.confirm import Confirmation
from batchwright.report import advice_words as words
from batchwright.report import amounts
from batchwright.report.figures import COLOURS, draw_bars, draw_picture
from batchwright.report.page import fill_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_TRIALS = 12


def render_advice(
    advice: Advice, confirmation: Confirmation | None, not_run: str, source: str, model: str
) -> str:
    """The page.

    Args:
        not_run: why there were no real runs, where there were none.
    Raises:
        ConfigError: matplotlib is not installed.
    """
    own, picked = advice.own.knobs, words.chosen(advice, confirmation)
    queue, devices = advice.queue, advice.devices
    return fill_page(
        "advice.html",
        figures={name: Markup(svg) for name, svg in _figures(advice, confirmation).items()},
        advice=advice,
        source=source,
        model=model,
        options=words.options(picked, own),
        reasons=words.reasons(advice, confirmation, not_run),
        batch=words.batch_words(advice) + words.memory_words(advice.memory),
        queue=[] if queue is None else words.queue_words(queue),
        devices=[] if devices is None else words.device_words(devices, advice.device),
        own=own,
        name_of=words.knobs_words,
    )


def _figures(advice: Advice, confirmation: Confirmation | None) -> dict[str, str]:
    shown = words.worth_showing(advice, SHOWN_TRIALS)
    height = 0.6 + 0.27 * (len(shown) + 1)
    figures = {
        "batch": draw_picture("batch", 3.0, partial(_draw_batch, advice), "Throughput and latency"),
        "trials": draw_picture("trials", height, partial(_draw_trials, advice), "Predicted time"),
    }
    if confirmation is not None:
        height = 0.5 + 0.35 * len(confirmation.knobs)
        draw = partial(_draw_measured, confirmation)
        figures["measured"] = draw_picture("measured", height, draw, "Measured time")
    if advice.queue is not None:
        figures["queue"] = draw_picture(
            "queue", 2.6, partial(_draw_queue, advice.queue), "Wait by limit"
        )
    if advice.devices is not None:
        draw_devices = partial(_draw_devices, advice.devices)
        figures["devices"] = draw_picture("devices", 2.6, draw_devices, "Time by number of devices")
    return figures


def _draw_batch(advice: Advice, figure: Figure) -> None:
    sizes = [point.batch_size for point in advice.profile]
    throughput, latency = figure.subplots(1, 2)
    best = advice.memory.best
    alone = advice.profile[0].tokens_per_s
    most = max(point.tokens_per_s for point in advice.profile)
    ideal = [size for size in sizes if size * alone <= 1.15 * most]
    throughput.plot(ideal, [size * alone for size in ideal], color=COLOURS["faint"], ls=":")
    throughput.plot(
        sizes, [p.tokens_per_s for p in advice.profile], color=COLOURS["decode"], marker="o", ms=4
    )
    throughput.set_title("Tokens per second, in and out (dotted: in proportion)")
    latency.plot(
        sizes, [1e3 * p.token_s for p in advice.profile], color=COLOURS["prefill"], marker="o", ms=4
    )
    latency.set_title("Milliseconds between two tokens of a row")
    for axes in (throughput, latency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel("sequences at once")
        axes.set_ylim(bottom=0)
        axes.axvline(best.batch_size, color=COLOURS["ink"], linewidth=1, linestyle="--")


def _draw_trials(advice: Advice, figure: Figure) -> None:
    own = advice.own
    bars = []
    for trial in words.worth_showing(advice, SHOWN_TRIALS):
        colour = "saved" if trial is advice.pick else "other" if trial is own else "decode"
        bars.append((words.knobs_words(trial, own.knobs), trial.seconds, colour))
    draw_bars(figure.subplots(), bars, amounts.seconds)


def _draw_measured(confirmation: Confirmation, figure: Figure) -> None:
    axes = figure.subplots()
    names = [
        words.options(knobs, confirmation.knobs[0]) or "the settings you have"
        for knobs in confirmation.knobs
    ]
    for index, name in enumerate(names):
        times = [times[index] for times in confirmation.rounds]
        colour = COLOURS["saved" if index and confirmation.beats(index) else "decode"]
        axes.plot(times, [name] * len(times), "o", color=colour, alpha=0.6)
        axes.plot([confirmation.median_s(index)], [name], "|", color=colour, ms=20, mew=2)
    axes.set_xlabel("seconds; the bar is the median")
    axes.set_ylim(len(names) - 0.5, -0.5)


def _draw_queue(queue: QueueAdvice, figure: Figure) -> None:
    stable = [one for one in queue.limits if one.utilisation < 1]
    panels = figure.subplots(1, 2 if stable else 1, squeeze=False)[0]
    cut = panels[-1]
    if stable:
        panels[0].plot(
            [q.max_tokens for q in stable], [q.wait_s for q in stable], color=COLOURS["decode"]
        )
        panels[0].set_title("Mean wait if one is served at a time, s")
    cut.plot(
        [q.max_tokens for q in queue.limits],
        [100 * q.clipped_fraction for q in queue.limits],
        color=COLOURS["again"],
    )
    cut.set_title("Outputs cut off, %")
    for axes in panels:
        axes.set_xlabel("max_tokens")
        axes.set_ylim(bottom=0)
        if queue.limit is not None:
            axes.axvline(queue.limit.max_tokens, color=COLOURS["ink"], linewidth=1, linestyle="--")


def _draw_devices(devices: DeviceAdvice, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    sizes = sorted({one.layout.replica_size for one in devices.tried})
    for size, colour in zip(sizes, ("prefill", "decode", "saved", "tail"), strict=False):
        mine = [one for one in devices.tried if one.layout.replica_size == size]
        mine.sort(key=lambda one: one.layout.num_devices)
        numbers = [one.layout.num_devices for one in mine]
        times = [one.seconds for one in mine]
        axes.plot(numbers, times, "o-", ms=4, color=COLOURS[colour], label=f"{size} a replica")
    axes.axhline(devices.target_s, color=COLOURS["ink"], linewidth=1, linestyle="--")
    axes.set_xlabel("devices")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Predicted seconds (dashed: the target)")
    axes.set_ylim(bottom=0)
    if devices.tried:
        axes.legend(frameon=False)
