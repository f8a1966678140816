"""Counts of several engines added up."""

from __future__ import annotations

from batchwright.job.engine_counts import EngineCounts
from batchwright.sched.intake import SchedulerStats


def add_counts(total: SchedulerStats, counts: EngineCounts) -> None:
    """Add what one engine has counted since it was asked last."""
    total.num_steps += counts.steps
    total.num_computed_tokens += counts.computed_tokens
    total.num_cached_tokens += counts.cached_tokens
    total.num_generated_tokens += counts.generated_tokens
    total.num_preemptions += counts.preemptions
    total.num_folded += counts.folded
    work = total.work
    work.num_recomputed_tokens += counts.recomputed_tokens
    work.num_rows += counts.step_rows
    work.num_prompt_tokens += counts.prompt_tokens
    work.num_output_tokens += counts.output_tokens
    work.num_logits += counts.logits
    work.num_scored += counts.scored
    work.num_prompt_keys = _sum(work.num_prompt_keys, counts.prompt_keys)
    work.num_output_keys = _sum(work.num_output_keys, counts.output_keys)
    work.num_recomputed_keys = _sum(work.num_recomputed_keys, counts.recomputed_keys)


def _sum(before: list[int], more: tuple[int, ...]) -> list[int]:
    """By KV group; an engine that has computed nothing has no groups yet."""
    return [
        a + b for a, b in zip(before or [0] * len(more), more or [0] * len(before), strict=True)
    ]
