"""Intervals: a job over time, for pictures."""

from __future__ import annotations

from collections.abc import Sequence

from batchwright.job.metrics import Sample
from batchwright.report.numbers import Interval
from batchwright.report.read import Run

MAX_INTERVALS = 400


def intervals(runs: Sequence[Run]) -> list[Interval]:
    """The stretches between a job's lines, joined where there are more than MAX_INTERVALS."""
    total_s = sum(run.start.load_s + run.last.t_s for run in runs)
    found: list[Interval] = []
    start_s = 0.0
    for index, run in enumerate(runs):
        if run.start.load_s:
            end_s = start_s + run.start.load_s
            seconds = {"load": run.start.load_s}
            found.append(Interval(start_s=start_s, end_s=end_s, run=index, seconds=seconds))
            start_s = end_s
        before = Sample()
        for sample in _spread(run.samples, total_s / MAX_INTERVALS):
            if sample.t_s > before.t_s:
                found.append(_interval(start_s, index, before, sample))
                before = sample
        start_s += run.last.t_s
    return found


def tails(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """[start, end) of each run's tail on the same clock; runs without one are left out."""
    found: list[tuple[float, float]] = []
    start_s = 0.0
    for run in runs:
        start_s += run.start.load_s
        end_s = start_s + run.last.t_s
        since_s = run.last.tail_since_s
        if since_s is not None and start_s + since_s < end_s:
            found.append((start_s + since_s, end_s))
        start_s = end_s
    return found


def _spread(samples: Sequence[Sample], least_s: float) -> list[Sample]:
    """Samples at least `least_s` apart; of those that are nearer, the last of all stays."""
    chosen: list[Sample] = []
    for sample in samples:
        if not chosen or sample.t_s - chosen[-1].t_s >= least_s:
            chosen.append(sample)
    if samples and chosen[-1] is not samples[-1]:
        chosen.append(samples[-1])
    return chosen


def _interval(start_s: float, run: int, before: Sample, after: Sample) -> Interval:
    length_s = after.t_s - before.t_s
    seconds = {
        part: max(getattr(after, f"{part}_s") - getattr(before, f"{part}_s"), 0.0)
        for part in ("compile", "prefill", "decode", "idle", "write")
    }
    seconds["other"] = max(length_s - sum(seconds.values()), 0.0)
    prompt_tokens = after.computed_prompt_tokens - before.computed_prompt_tokens
    return Interval(
        start_s=start_s + before.t_s,
        end_s=start_s + after.t_s,
        run=run,
        seconds=seconds,
        prompt_tokens_per_s=prompt_tokens / length_s,
        output_tokens_per_s=(after.generated_tokens - before.generated_tokens) / length_s,
        running=after.num_running_seqs,
        waiting=after.num_waiting_seqs,
        kv_used_fraction=after.kv_used_fraction,
    )
