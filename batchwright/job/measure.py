"""measure: the state of a running job as a line of metrics.jsonl."""

from __future__ import annotations

from collections import Counter

from batchwright.job.engine_counts import EngineCounts
from batchwright.job.metrics import Sample, peak_memory_bytes
from batchwright.job.step_times import StepTimes
from batchwright.job.summary import JobSummary


def measure(
    summary: JobSummary,
    counts: EngineCounts,
    times: StepTimes,
    *,
    rows_waiting: int,
    num_running_seqs: int,
    num_waiting_seqs: int,
    kv_used_fraction: float,
    helper_bytes: int,
) -> Sample:
    """A Sample without its times.

    Args:
        counts: what the engine did in this run.
        rows_waiting: rows in the engine that have not started.
        helper_bytes: see `EngineLoad`.
    """
    return Sample(
        rows_read=summary.num_rows_read,
        rows_skipped=summary.num_skipped,
        rows_succeeded=summary.num_succeeded,
        rows_failed=summary.num_failed,
        rows_expired=summary.num_expired,
        rows_cancelled=summary.num_cancelled,
        rows_length_limited=summary.num_length_limited,
        rows_folded=counts.folded,
        rows_running=summary.num_in_flight - rows_waiting,
        rows_waiting=rows_waiting,
        rows_estimated=summary.estimated_rows,
        input_ended=summary.input_ended,
        stopped=summary.stopped,
        eta_s=summary.eta_s,
        error_codes=dict(summary.error_codes),
        prompt_tokens=summary.num_prompt_tokens,
        output_tokens=summary.num_output_tokens,
        allowed_tokens_done=summary.num_allowed_tokens_done,
        generated_tokens=counts.generated_tokens,
        cached_tokens=counts.cached_tokens,
        computed_tokens=counts.computed_tokens,
        computed_prompt_tokens=counts.prompt_tokens,
        recomputed_tokens=counts.recomputed_tokens,
        preemptions=counts.preemptions,
        prompt_lengths=_as_list(summary.prompt_lengths),
        output_lengths=_as_list(summary.output_lengths),
        steps=counts.steps,
        step_rows=counts.step_rows,
        logits=counts.logits + counts.scored,
        keys=[p + o for p, o in zip(counts.prompt_keys, counts.output_keys, strict=True)],
        recomputed_keys=list(counts.recomputed_keys),
        step_s=times.step_s,
        compile_s=times.compile_s,
        prefill_s=times.prefill_s,
        decode_s=times.decode_s,
        idle_s=summary.idle_s,
        write_s=summary.write_s,
        tail_prefill_s=times.tail_prefill_s,
        tail_decode_s=times.tail_decode_s,
        num_running_seqs=num_running_seqs,
        num_waiting_seqs=num_waiting_seqs,
        kv_used_fraction=kv_used_fraction,
        peak_memory_bytes=peak_memory_bytes() + helper_bytes,
    )


def _as_list(counts: Counter[int]) -> list[int]:
    """The counts of 0, 1, 2, ... up to the last that is not zero."""
    return [counts[bits] for bits in range(max(counts, default=-1) + 1)]
