"""Findings: in words, what a job's speed was limited by, and what would change it."""

from __future__ import annotations

from collections.abc import Callable

from batchwright.report.numbers import Interval, Report

NOTEWORTHY = 0.15  # share of the time from which on a part is worth a sentence
FULL = 0.9  # share of blocks in use from which on memory counts as full


def findings(report: Report) -> list[str]:
    """Sentences, the most important first; what took most of the time leads."""
    times = report.times
    if not times.total_s or not report.steps:
        return ["Nothing was computed yet, so there is nothing to explain."]
    parts = {
        "load": _load(report),
        "compile": "Kernels are compiled once on a machine; later runs find them in the cache.",
        "prefill": _prefill(report),
        "decode": _decode(report),
        "tail": _tail(report),
        "idle": "The model waited for input: rows were read, checked and tokenised more slowly "
        "than they were answered.",
        "write": "Making answers and writing them to the disk took its time: look at the disk, or "
        "at rows with many log-probabilities.",
        "other": "Much of the time lies outside the model: many small rows, or a machine that was "
        "busy with something else.",
    }
    seconds = {part: getattr(times, f"{part}_s") for part in parts}
    ranked = sorted(parts, key=lambda part: -seconds[part])
    told = [
        f"{_NAMES[part]}: {seconds[part] / times.total_s:.0%} of the time. {parts[part]}"
        for index, part in enumerate(ranked)
        if index == 0 or seconds[part] >= NOTEWORTHY * times.total_s
    ]
    return told + _further(report)


_NAMES = {
    "load": "Loading the model",
    "compile": "Compiling kernels",
    "prefill": "Prefill, computing prompts",
    "decode": "Decode, generating tokens",
    "tail": "The tail",
    "idle": "Idle",
    "write": "Writing",
    "other": "Everything else",
}


def _load(report: Report) -> str:
    runs = len(report.runs)
    each = "" if runs < 2 else f" It was loaded {runs} times, once a run."
    return f"The job is short beside it; a longer one would hardly notice.{each}"


def _prefill(report: Report) -> str:
    tokens = report.tokens
    text = f"{tokens.computed_prompt:,} prompt tokens were computed"
    if tokens.cached:
        text += f", {tokens.cached:,} were saved because rows share prefixes"
    return f"{text}. Shorter prompts would help, or more of them in common."


def _decode(report: Report) -> str:
    mean = report.mean_rows_per_step
    text = f"A step had {mean:,.0f} rows in the mean; the weights are read once a step for all. "
    most = report.settings.get("max_num_seqs")
    waited = _weigh(report, lambda interval: interval.waiting > 0)
    if waited < 0.5:
        return text + "The job had too few rows left to run more at once."
    if _weigh(report, lambda i: i.waiting > 0 and i.kv_used_fraction >= FULL) > waited / 2:
        return text + (
            "Rows waited because the memory for keys and values was full: more of it "
            "(--kv-cache-memory) would let more of them run at once."
        )
    if isinstance(most, int) and report.max_running >= most:
        return text + (
            f"Rows waited because {most:,} sequences ran, the most that is allowed: raising "
            "--max-num-seqs may help."
        )
    return text + "Rows were waiting, so it was the machine that was full."


def _weigh(report: Report, holds: Callable[[Interval], bool]) -> float:
    """Share of the time of decoding before the tails in which something holds."""
    decoding = [
        (interval.seconds.get("decode", 0.0), holds(interval))
        for interval in report.intervals
        if not any(start_s <= interval.start_s < end_s for start_s, end_s in report.tails)
    ]
    total = sum(seconds for seconds, _ in decoding)
    return sum(seconds for seconds, is_so in decoding if is_so) / total if total else 0.0


def _tail(report: Report) -> str:
    return (
        "Near the end too few rows were left to fill the machine: the last ones are longer than "
        "the rest. A lower max_tokens, or the long rows first, would shorten it."
    )


def _further(report: Report) -> list[str]:
    tokens, told = report.tokens, []
    if tokens.recomputed > 0.02 * tokens.computed:
        told.append(
            f"{tokens.recomputed / tokens.computed:.0%} of the computed tokens were computed again "
            f"after {report.preemptions:,} preemptions: memory for keys and values ran short "
            "(--kv-cache-memory)."
        )
    roofline = report.roofline
    if roofline is not None:
        told.append(
            f"The work that had to be done takes {roofline.least_s:,.1f} s at the machine's best "
            f"matrix products: the steps reached {roofline.fraction:.0%} of that."
        )
    if report.rows_length_limited:
        told.append(
            f"{report.rows_length_limited:,} rows were cut off by max_tokens or the context."
        )
    if report.num_damaged_lines:
        told.append(
            f"{report.num_damaged_lines:,} lines of metrics.jsonl were damaged and left out."
        )
    return told
