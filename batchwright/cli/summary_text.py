"""The table at the end of a run."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from batchwright.job.preflight import STDIO
from batchwright.job.summary import EXPIRED_CODES, JobSummary


def print_summary(
    console: Console, summary: JobSummary, *, load_s: float, output: str, errors: str
) -> None:
    """Print what became of the rows, what was computed, how long it took, and where results are."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for name, value, note in _lines(summary, load_s):
        table.add_row(name, value, note)
    console.print(table)
    if summary.num_succeeded and output != STDIO:
        console.print(f"Results: {output}", markup=False, highlight=False, soft_wrap=True)
    if summary.num_failed and errors != STDIO:
        console.print(f"Failed rows: {errors}", markup=False, highlight=False, soft_wrap=True)
    if summary.stopped:
        text = _stopped_text(summary)
        if output != STDIO:
            text += " Give the same command to go on."
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _lines(summary: JobSummary, load_s: float) -> list[tuple[str, str, str]]:
    engine, run_s = summary.engine, summary.run_s
    lines = [
        ("rows read", f"{summary.num_rows_read:,}", ""),
        ("  succeeded", f"{summary.num_succeeded:,}", ""),
        ("  failed", f"{summary.num_failed:,}", _error_kinds(summary, expired=False)),
    ]
    if summary.num_skipped:
        note = "finished by an earlier run"
        lines.insert(1, ("  done before", f"{summary.num_skipped:,}", note))
    if summary.num_expired:
        lines.append(("  expired", f"{summary.num_expired:,}", _error_kinds(summary, expired=True)))
    if summary.num_cancelled:
        lines.append(("  cancelled", f"{summary.num_cancelled:,}", "no answer was written"))
    if summary.num_length_limited:
        note = "ended by max_tokens or the context, not by the model"
        lines.append(("cut by length", f"{summary.num_length_limited:,}", note))
    if engine.num_folded:
        note = "rows, or entries of lists, answered by an identical one's computation"
        lines.append(("duplicates", f"{engine.num_folded:,}", note))
    num_input = engine.num_computed_tokens + engine.num_cached_tokens
    cached = f"{engine.num_cached_tokens / num_input:.0%} of all" if num_input else ""
    lines += [
        ("prompt tokens", f"{summary.num_prompt_tokens:,}", "of rows that succeeded"),
        ("tokens reused", f"{engine.num_cached_tokens:,}", f"shared prefixes, {cached}"),
        ("tokens computed", f"{engine.num_computed_tokens:,}", f"in {engine.num_steps:,} steps"),
    ]
    if engine.num_recomputed_tokens:
        preemptions = f"{engine.num_preemptions:,} preemptions for want of memory"
        note = f"after {preemptions if engine.num_preemptions else 'steps that failed'}"
        lines.append(("  recomputed", f"{engine.num_recomputed_tokens:,}", note))
    rate = f"{engine.num_generated_tokens / run_s:,.0f} tokens/s" if run_s else ""
    lines += [
        ("tokens generated", f"{engine.num_generated_tokens:,}", rate),
        ("time to load", f"{load_s:,.1f} s", ""),
        ("time to run", f"{run_s:,.1f} s", ""),
    ]
    return lines


def _error_kinds(summary: JobSummary, *, expired: bool) -> str:
    kinds = summary.error_codes.most_common()
    return ", ".join(f"{code}: {n:,}" for code, n in kinds if (code in EXPIRED_CODES) is expired)


def _stopped_text(summary: JobSummary) -> str:
    rest = "" if summary.input_ended else " The rest of the input was not read."
    return (
        f"Stopped before the end: {summary.num_done:,} rows are done, "
        f"{summary.num_cancelled:,} that were read are not.{rest}"
    )
