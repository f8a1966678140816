"""Progress on standard error: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from batchwright.cli.printable import printable
from batchwright.job.events import Draining, JobEvent, Progressed, RowFailed
from batchwright.job.summary import JobSummary
from batchwright.report.amounts import duration

MAX_FAILURES_SHOWN = 10
RATE_WINDOW_S = 10.0
BAR_INTERVAL_S = 0.2
LINE_INTERVAL_S = 5.0


class _Rate:
    """Tokens per second over the last RATE_WINDOW_S."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def update(self, now_s: float, num_tokens: int) -> float:
        self._points.append((now_s, num_tokens))
        while len(self._points) > 2 and now_s - self._points[1][0] > RATE_WINDOW_S:
            self._points.popleft()
        first_s, first_tokens = self._points[0]
        return (num_tokens - first_tokens) / (now_s - first_s) if now_s > first_s else 0.0


class _View(Protocol):
    """How a state of the job is shown."""

    interval_s: float

    def show(self, summary: JobSummary, tokens_per_s: float) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class _Bar:
    """A live bar."""

    interval_s = BAR_INTERVAL_S

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None)
        self._progress.start()

    def show(self, summary: JobSummary, tokens_per_s: float) -> None:
        self._progress.update(
            self._task,
            total=summary.estimated_rows,
            completed=summary.num_done,
            description=escape(status_line(summary, tokens_per_s)),
        )
        self._progress.refresh()

    def say(self, text: str) -> None:
        self._progress.console.print(escape(text), highlight=False)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """Plain lines."""

    interval_s = LINE_INTERVAL_S

    def __init__(self, console: Console) -> None:
        self._write = console.file.write
        self._flush = console.file.flush

    def show(self, summary: JobSummary, tokens_per_s: float) -> None:
        self.say(status_line(summary, tokens_per_s))

    def say(self, text: str) -> None:
        self._write(text + "\n")
        self._flush()

    def close(self) -> None:
        pass


class ProgressReport:
    """Shows a job's events; use as a context manager and pass `on_event` to the job.

    Args:
        console: on standard error; a bar is drawn if it is a terminal.
        now: the clock, in seconds.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.perf_counter) -> None:
        self._view: _View = _Bar(console) if console.is_terminal else _Lines(console)
        self._now = now
        self._rate = _Rate()
        self._next_s = now()
        self._num_failures_shown = 0

    def __enter__(self) -> ProgressReport:
        return self

    def __exit__(self, *_: object) -> None:
        self._view.close()

    def on_event(self, event: JobEvent) -> None:
        """Take note of an event; show it if it is time."""
        if isinstance(event, RowFailed):
            self._show_failure(event)
        elif isinstance(event, Draining):
            self._view.say(
                f"Stopping: {event.num_running} running rows are finished first (at most "
                f"{event.limit_s:.0f} s). Press Ctrl-C again to stop at once."
            )
        elif isinstance(event, Progressed) and (now_s := self._now()) >= self._next_s:
            self._next_s = now_s + self._view.interval_s
            summary = event.summary
            rate = self._rate.update(now_s, summary.engine.num_generated_tokens)
            self._view.show(summary, rate)

    def _show_failure(self, event: RowFailed) -> None:
        self._num_failures_shown += 1
        if self._num_failures_shown <= MAX_FAILURES_SHOWN:
            name = "" if event.custom_id is None else f" ({printable(event.custom_id)})"
            self._view.say(f"Failed: line {event.line}{name}: {printable(event.error.message)}")
        elif self._num_failures_shown == MAX_FAILURES_SHOWN + 1:
            self._view.say("Further failures are in the error file.")


def status_line(summary: JobSummary, tokens_per_s: float) -> str:
    """One line: rows, tokens, rate, time left, errors so far."""
    total = summary.estimated_rows
    of_total = "" if total is None else f"/{'' if summary.input_ended else '~'}{total:,}"
    parts = [
        f"{summary.num_done:,}{of_total} rows",
        f"{summary.engine.num_generated_tokens:,} tokens",
    ]
    if tokens_per_s:
        parts.append(f"{tokens_per_s:,.0f} tokens/s")
    if (eta_s := summary.eta_s) is not None:
        parts.append(f"{duration(eta_s)} left")
    if summary.num_failed:
        parts.append(f"{summary.num_failed:,} failed")
    return ", ".join(parts)
