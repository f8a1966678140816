"""Report: the numbers that explain a job's speed. docs/metrics.md defines them.

Nothing here holds text or ids of rows, so a report may be shown to anybody.
"""

from __future__ import annotations

from typing import Any

import msgspec

from batchwright.job.machine import Machine

PARTS = ("load", "compile", "prefill", "decode", "tail", "idle", "write", "other")


class Times(msgspec.Struct, kw_only=True):
    """Where seconds went; the parts add up to `total_s`.

    Attributes:
        load_s: the model was loaded.
        compile_s: kernels were compiled, which happens once on a machine.
        prefill_s, decode_s: steps before the tail, divided by their FLOPs.
        tail_s: steps of the tail.
        idle_s: nothing to run; waiting for input.
        write_s: making answers, committing them, writing the files.
        other_s: the rest: taking rows in, looking after the job.
        step_s: all steps: prefill_s + decode_s + tail_s.
        total_s: from the start of loading to the last line.
    """

    load_s: float = 0.0
    compile_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    tail_s: float = 0.0
    idle_s: float = 0.0
    write_s: float = 0.0
    other_s: float = 0.0
    step_s: float = 0.0
    total_s: float = 0.0


class Tokens(msgspec.Struct, kw_only=True):
    """What was computed, and what was not because rows share prefixes.

    Attributes:
        prompt: of rows that succeeded.
        output: of rows that succeeded.
        generated: drawn, whatever became of their row.
        computed, computed_prompt: passed through the model; the part of them that are prompts'.
        recomputed: computed again after preemption or a failed step; part of computed.
        cached: prompt tokens taken from blocks that another row had computed.
        saved_fraction: cached / (cached + computed_prompt), None if there were no prompts.
        prompt_lengths, output_lengths: entry i counts lengths of i bits: 0, 1, 2-3, 4-7, ...
    """

    prompt: int = 0
    output: int = 0
    generated: int = 0
    computed: int = 0
    computed_prompt: int = 0
    recomputed: int = 0
    cached: int = 0
    saved_fraction: float | None = None
    prompt_lengths: list[int] = []
    output_lengths: list[int] = []


class Roofline(msgspec.Struct, kw_only=True):
    """The work that had to be done, against the fastest products of the machine.

    Attributes:
        computed_flops: of all steps.
        necessary_flops: the same without what was recomputed: shared prefixes once.
        best_flops_per_s: necessary_flops / least_s.
        least_s: seconds that necessary_flops take at the rates of the ceiling.
        step_s, total_s: of the runs that count, as in `Times`.
        fraction: least_s / step_s.
        fraction_of_total: least_s / total_s.
        num_runs: runs that count: those on the machine that the ceiling was measured on.
    """

    computed_flops: int
    necessary_flops: int
    best_flops_per_s: float
    least_s: float
    step_s: float
    total_s: float
    fraction: float
    fraction_of_total: float
    num_runs: int


class RunNumbers(msgspec.Struct, kw_only=True):
    """One run. `outcome`: end, error (it broke off), stop, or None (killed, or still running)."""

    start_time: float
    outcome: str | None
    rows_succeeded: int
    rows_failed: int
    rows_expired: int
    times: Times


class Interval(msgspec.Struct, kw_only=True):
    """A stretch of the job between two lines; time goes on from run to run without the gaps.

    Attributes:
        start_s, end_s: on the job's clock, which runs only while a run does.
        run: index of the run.
        seconds: of the interval, by part; "tail" is not told apart here.
        prompt_tokens_per_s, output_tokens_per_s: prompt tokens computed, tokens generated.
        running, waiting: sequences at its end.
        kv_used_fraction: at its end.
    """

    start_s: float
    end_s: float
    run: int
    seconds: dict[str, float]
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    running: int = 0
    waiting: int = 0
    kv_used_fraction: float = 0.0


class Report(msgspec.Struct, kw_only=True):
    """See the module docstring.

    Attributes:
        state: of the job: running, finished, ...
        rows: committed rows by state, of all runs.
        rows_folded, rows_length_limited: answered by an identical row's computation; cut by length.
        error_codes: committed rows that failed or expired, by code.
        rows_per_s, output_tokens_per_s, total_tokens_per_s: per second of runs, loading left out;
            total counts prompts that were saved, too.
        mean_rows_per_step, max_running, kv_used_max, peak_memory_bytes: how full the machine was.
        roofline: None if no ceiling is known for the machine.
        findings: in words, the most important first.
        tails: [start, end) of each run's tail, on the job's clock.
    """

    name: str
    state: str
    engine: str
    model: str
    machine: Machine
    settings: dict[str, Any]
    rows: dict[str, int]
    rows_folded: int
    rows_length_limited: int
    error_codes: dict[str, int]
    times: Times
    tokens: Tokens
    preemptions: int
    steps: int
    rows_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    mean_rows_per_step: float
    max_running: int
    kv_used_max: float
    peak_memory_bytes: int
    roofline: Roofline | None
    findings: list[str]
    runs: list[RunNumbers]
    intervals: list[Interval]
    tails: list[tuple[float, float]]
    num_damaged_lines: int
