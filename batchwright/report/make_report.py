"""make_report: from what is known of a job to the numbers of its report.

Sums go over all runs of the job; a run that was killed counts up to its last line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from batchwright.job.machine import Machine
from batchwright.job.metrics import RunStart, Sample
from batchwright.report.ceiling import Ceiling
from batchwright.report.findings import findings
from batchwright.report.intervals import intervals, tails
from batchwright.report.numbers import Report, Roofline, RunNumbers, Times, Tokens
from batchwright.report.read import JobRecord, Run
from batchwright.sched.work import work_flops


def make_report(record: JobRecord, ceiling: Ceiling | None = None) -> Report:
    """The numbers of a job.

    Args:
        ceiling: of the machine of the last run; None leaves the roofline out.
    """
    runs, lasts = record.runs, [run.last for run in record.runs]
    start = runs[-1].start if runs else RunStart()
    numbers = [_run_numbers(run) for run in runs]
    times, tokens = total_times(run.times for run in numbers), total_tokens(lasts)
    run_s = times.total_s - times.load_s
    samples = [sample for run in runs for sample in run.samples]
    steps = sum(last.steps for last in lasts)
    report = Report(
        name=record.name,
        state=record.state.value,
        engine=start.engine,
        model=start.model,
        machine=start.machine,
        settings=start.settings,
        rows=record.rows,
        rows_folded=sum(last.rows_folded for last in lasts),
        rows_length_limited=sum(last.rows_length_limited for last in lasts),
        error_codes=dict(record.error_codes.most_common()),
        times=times,
        tokens=tokens,
        preemptions=sum(last.preemptions for last in lasts),
        steps=steps,
        rows_per_s=_rate(sum(last.rows_succeeded for last in lasts), run_s),
        output_tokens_per_s=_rate(tokens.generated, run_s),
        total_tokens_per_s=_rate(tokens.generated + tokens.computed_prompt + tokens.cached, run_s),
        mean_rows_per_step=_rate(sum(last.step_rows for last in lasts), steps),
        max_running=max((sample.num_running_seqs for sample in samples), default=0),
        kv_used_max=max((sample.kv_used_fraction for sample in samples), default=0.0),
        peak_memory_bytes=max((last.peak_memory_bytes for last in lasts), default=0),
        roofline=None if ceiling is None else roofline(runs, start.machine, ceiling),
        findings=[],
        runs=numbers,
        intervals=intervals(runs),
        tails=tails(runs),
        num_damaged_lines=record.num_damaged_lines,
    )
    report.findings = findings(report)
    return report


def run_times(run: Run) -> Times:
    """Where the time of one run went."""
    last, load_s = run.last, run.start.load_s
    known_s = last.step_s + last.compile_s + last.idle_s + last.write_s
    return Times(
        load_s=load_s,
        compile_s=last.compile_s,
        prefill_s=last.prefill_s - last.tail_prefill_s,
        decode_s=last.decode_s - last.tail_decode_s,
        tail_s=last.tail_prefill_s + last.tail_decode_s,
        idle_s=last.idle_s,
        write_s=last.write_s,
        other_s=max(last.t_s - known_s, 0.0),
        step_s=last.step_s,
        total_s=load_s + max(last.t_s, known_s),
    )


def total_times(runs: Iterable[Times]) -> Times:
    """The sum over runs."""
    total = Times()
    for times in runs:
        for name in Times.__struct_fields__:
            setattr(total, name, getattr(total, name) + getattr(times, name))
    return total


def total_tokens(lasts: Sequence[Sample]) -> Tokens:
    """The sum over runs, of their last lines."""
    computed = sum(last.computed_prompt_tokens for last in lasts)
    cached = sum(last.cached_tokens for last in lasts)
    return Tokens(
        prompt=sum(last.prompt_tokens for last in lasts),
        output=sum(last.output_tokens for last in lasts),
        generated=sum(last.generated_tokens for last in lasts),
        computed=sum(last.computed_tokens for last in lasts),
        computed_prompt=computed,
        recomputed=sum(last.recomputed_tokens for last in lasts),
        cached=cached,
        saved_fraction=cached / (cached + computed) if cached + computed else None,
        prompt_lengths=_added(last.prompt_lengths for last in lasts),
        output_lengths=_added(last.output_lengths for last in lasts),
    )


def roofline(runs: Sequence[Run], machine: Machine, ceiling: Ceiling) -> Roofline | None:
    """How near the runs on this machine came to its ceiling; None if no work was counted."""
    mine = [run for run in runs if run.start.machine == machine and _has_work(run)]
    computed = layers = logits = 0
    for run in mine:
        last, shape = run.last, run.start.shape
        assert shape is not None
        repeated = last.recomputed_keys or [0] * len(last.keys)
        needed_keys = [all - again for all, again in zip(last.keys, repeated, strict=False)]
        computed += sum(work_flops(shape, last.computed_tokens, last.keys, last.logits))
        num_needed = last.computed_tokens - last.recomputed_tokens
        needed = work_flops(shape, num_needed, needed_keys, last.logits)
        layers, logits = layers + needed[0], logits + needed[1]
    times = total_times(run_times(run) for run in mine)
    least_s = ceiling.seconds(layers, logits)
    if not least_s or not times.step_s:
        return None
    return Roofline(
        computed_flops=computed,
        necessary_flops=layers + logits,
        best_flops_per_s=(layers + logits) / least_s,
        least_s=least_s,
        step_s=times.step_s,
        total_s=times.total_s,
        fraction=least_s / times.step_s,
        fraction_of_total=least_s / times.total_s,
        num_runs=len(mine),
    )


def _has_work(run: Run) -> bool:
    """Whether the model's sizes are known and fit what was counted."""
    shape, num_groups = run.start.shape, len(run.last.keys)
    return shape is not None and num_groups in (0, len(shape.attention))


def _run_numbers(run: Run) -> RunNumbers:
    last = run.last
    return RunNumbers(
        start_time=run.start.time,
        outcome="stop" if last.stopped else last.event,
        rows_succeeded=last.rows_succeeded,
        rows_failed=last.rows_failed,
        rows_expired=last.rows_expired,
        times=run_times(run),
    )


def _added(lists: Iterable[Sequence[int]]) -> list[int]:
    """Element by element."""
    total: list[int] = []
    for values in lists:
        total += [0] * (len(values) - len(total))
        for index, value in enumerate(values):
            total[index] += value
    return total


def _rate(count: float, per: float) -> float:
    return count / per if per else 0.0
