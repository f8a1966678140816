"""How fast are the four workloads, and what fraction of this machine's ceiling is that?

    python -m benchmarks.run [--scale 0.5] [--only W1,W3] [--against transformers] [--repeat 3]

Lengths are forced (end tokens ignored), drawing is greedy. For every workload: seconds (median of
the repeats), tokens per second, peak memory, prompt tokens saved by sharing against what a perfect
engine saves, and the ceiling's fraction: the seconds that the job's necessary FLOPs would take at
this machine's best measured fp32 product rate (`exec/product_rates.py`, `necessary_work.py`),
divided by the seconds taken. Reading weights and keys is not counted, so decode-heavy jobs stay
below 100%.

Prints a table, then one JSON line. `--against transformers` runs `generate` on the same requests in
the same run, alternating, and compares the tokens. Use an idle machine; the load is in the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import PeakMemory, describe_commit, describe_machine, describe_versions
from benchmarks.necessary_work import NecessaryWork, necessary_work
from benchmarks.transformers_baseline import TransformersBaseline
from benchmarks.workloads import (
    WorkRequest,
    build_workloads,
    num_output_tokens,
    num_prompt_tokens,
    plain_encoder,
)

if TYPE_CHECKING:
    from batchwright.exec.executor import Executor
    from batchwright.exec.product_rates import Ceiling
    from batchwright.llm import LLM
    from batchwright.plan.shape import ModelShape
    from batchwright.step import Step, StepResult

TIE = 1e-3
"""Greedy tokens may differ where the reference's two highest logits are this close (fp32)."""


class TimedExecutor:
    """An executor whose time is added up; what is left of a run is scheduling and text."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.seconds = 0.0

    def execute(self, step: Step) -> StepResult:
        """See `Executor`."""
        start = time.perf_counter()
        result = self._executor.execute(step)
        self.seconds += time.perf_counter() - start
        return result

    def close(self) -> None:
        """See `Executor`."""
        self._executor.close()


@dataclass
class Startup:
    """Seconds from the first import to the first token."""

    import_s: float
    load_s: float
    first_step_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.import_s + self.load_s + self.first_step_s


@dataclass
class Agreement:
    """Our greedy tokens against the baseline's."""

    num_rows: int
    num_equal_first: int
    num_equal_rows: int
    num_ties: int  # rows that part where the baseline's top-2 margin is below TIE
    largest_margin: float  # of all rows that part; 0 if none does


@dataclass
class Measured:
    """One workload; lists have an entry per repeat, counts are those of the last."""

    name: str
    requests: list[WorkRequest]
    work: NecessaryWork
    seconds: list[float] = field(default_factory=list)
    execute_s: list[float] = field(default_factory=list)
    stats: dict[str, int] = field(default_factory=dict)
    before_bytes: int = 0  # resident before the first repeat
    peak_bytes: int = 0
    baseline_s: list[float] = field(default_factory=list)
    baseline_peak_bytes: int = 0
    agreement: Agreement | None = None

    @property
    def median_s(self) -> float:
        """Middle of the repeats."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float | None:
        """How many times the baseline's time is ours."""
        return statistics.median(self.baseline_s) / self.median_s if self.baseline_s else None


def main() -> None:
    """Run, print, and write what was asked for."""
    args = _arguments()
    spin_count = os.environ.get("GOMP_SPINCOUNT")  # importing batchwright sets it
    llm, startup = start(args)
    from batchwright.exec.product_rates import measure_ceiling

    shape = _model_shape(args.model)
    encode = plain_encoder(llm.tokenizer.encode)
    workloads = build_workloads(encode, scale=args.scale)
    measured = [
        Measured(name, workloads[name], necessary_work(workloads[name], shape))
        for name in args.only
    ]
    executor = TimedExecutor(llm.engine._executor)
    llm.engine._executor = executor  # the one look inside: time spent computing
    warm_up(llm, measured)
    first_ceiling = measure_ceiling(shape)
    with _baseline(args, llm, spin_count) as baseline:
        for workload in measured:
            for repeat in range(args.repeat):
                token_ids = measure(llm, executor, workload)
                if baseline is not None:
                    measure_baseline(baseline, workload, token_ids, compare=repeat == 0)
                _print_progress(workload)
    ceiling = first_ceiling.best(measure_ceiling(shape))
    print_table(measured, ceiling, startup)
    report = describe(args, llm, startup, ceiling, measured)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=0.5, help="number of requests, 1 is all")
    parser.add_argument("--only", type=_names, default=_names("W1,W2,W3,W4"), help="e.g. W1,W3")
    parser.add_argument("--against", choices=["transformers"], help="the baseline to run beside")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="JSON file, e.g. benchmarks/results/x.json")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = [name.strip().upper() for name in text.split(",")]
    if unknown := set(names) - {"W1", "W2", "W3", "W4"}:
        raise argparse.ArgumentTypeError(f"unknown workloads: {', '.join(sorted(unknown))}")
    return names


def start(args: argparse.Namespace) -> tuple[LLM, Startup]:
    """Import, load, and draw one token."""
    began = time.perf_counter()
    from batchwright.llm import LLM

    imported = time.perf_counter()
    settings = {
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_num_seqs": args.max_num_seqs,
        "num_threads": args.threads,
    }
    llm = LLM(args.model, **{name: value for name, value in settings.items() if value is not None})
    loaded = time.perf_counter()
    _generate(llm, [WorkRequest([1], 1)])
    return llm, Startup(imported - began, loaded - imported, time.perf_counter() - loaded)


def _model_shape(model: str) -> ModelShape:
    from batchwright.models.shape import read_shape
    from batchwright.weights.checkpoint import open_checkpoint
    from batchwright.weights.locate import locate_model

    return read_shape(open_checkpoint(locate_model(model)).config)


@contextlib.contextmanager
def _baseline(
    args: argparse.Namespace, llm: LLM, spin_count: str | None
) -> Iterator[TransformersBaseline | None]:
    if args.against is None:
        yield None
        return
    from batchwright.weights.locate import locate_model

    path, num_threads = locate_model(args.model), llm.config.num_threads
    with TransformersBaseline(path, num_threads, spin_count) as baseline:
        yield baseline


def warm_up(llm: LLM, measured: Sequence[Measured]) -> None:
    """A few short rows of every workload, so that no kernel is compiled on the clock."""
    rows = [request for workload in measured for request in workload.requests[:4]]
    _generate(llm, [WorkRequest(row.prompt_token_ids[:600], 4) for row in rows])


def measure(llm: LLM, executor: TimedExecutor, workload: Measured) -> list[list[int]]:
    """Run a workload once; returns the token ids of every request."""
    before, executor.seconds = dataclasses.asdict(llm.engine.stats), 0.0
    with PeakMemory() as memory:
        start = time.perf_counter()
        token_ids = _generate(llm, workload.requests)
        workload.seconds.append(time.perf_counter() - start)
    workload.execute_s.append(executor.seconds)
    after = dataclasses.asdict(llm.engine.stats)
    workload.stats = {name: after[name] - before[name] for name in after}
    workload.before_bytes = workload.before_bytes or memory.before_bytes
    workload.peak_bytes = max(workload.peak_bytes, memory.peak_bytes)
    return token_ids


def _generate(llm: LLM, requests: Sequence[WorkRequest]) -> list[list[int]]:
    from batchwright.request import SamplingParams

    results = llm.generate(
        [request.prompt_token_ids for request in requests],
        [
            SamplingParams(temperature=0.0, max_tokens=request.num_output_tokens, ignore_eos=True)
            for request in requests
        ],
    )
    for request, result in zip(requests, results, strict=True):
        if result.error is not None:
            raise result.error
        assert len(result.outputs[0].token_ids) == request.num_output_tokens
    return [result.outputs[0].token_ids for result in results]


def measure_baseline(
    baseline: TransformersBaseline,
    workload: Measured,
    token_ids: Sequence[list[int]],
    *,
    compare: bool,
) -> None:
    """Run the baseline once; compare its tokens with ours if asked to."""
    run = baseline.run(workload.requests)
    workload.baseline_s.append(run.seconds)
    workload.baseline_peak_bytes = max(workload.baseline_peak_bytes, run.peak_bytes)
    if compare:
        workload.agreement = agreement(baseline, workload.requests, token_ids, run.token_ids)


def agreement(
    baseline: TransformersBaseline,
    requests: Sequence[WorkRequest],
    ours: Sequence[list[int]],
    theirs: Sequence[list[int]],
) -> Agreement:
    """Count equal rows; where a row parts, ask the baseline how close its two best tokens were."""
    margins = []
    for request, our_ids, their_ids in zip(requests, ours, theirs, strict=True):
        pairs = enumerate(zip(our_ids, their_ids, strict=True))
        part = next((index for index, (a, b) in pairs if a != b), None)
        if part is not None:
            margins.append(baseline.top2_margin(request.prompt_token_ids + their_ids[:part]))
    return Agreement(
        num_rows=len(requests),
        num_equal_first=sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True)),
        num_equal_rows=len(requests) - len(margins),
        num_ties=sum(margin < TIE for margin in margins),
        largest_margin=max(margins, default=0.0),
    )


def _print_progress(workload: Measured) -> None:
    line = f"{workload.name}: {len(workload.requests)} requests, {workload.seconds[-1]:.2f} s"
    if workload.baseline_s:
        line += f"; baseline {workload.baseline_s[-1]:.2f} s"
    print(line, flush=True)


def print_table(measured: Sequence[Measured], ceiling: Ceiling, startup: Startup) -> None:
    """One line a workload, then what holds for all."""
    header = ("", "rows", "seconds", "prompt/s", "output/s", "total/s", "peak MiB")
    header += ("saved", "sharable", "steps", "executing", "of ceiling")
    rows = [header, *(_cells(workload, ceiling) for workload in measured)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    print()
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(
        f"\nceiling: {ceiling.layers / 1e9:.0f} GFLOP/s in the layers' products, "
        f"{ceiling.head / 1e9:.0f} in the output head's"
        f"\nstart-up: {startup.total_s:.2f} s (import {startup.import_s:.2f}, load "
        f"{startup.load_s:.2f}, first step {startup.first_step_s:.2f})"
    )
    for workload in measured:
        if workload.agreement is not None:
            print(_against(workload, workload.agreement))
    print()


def _cells(workload: Measured, ceiling: Ceiling) -> tuple[str, ...]:
    seconds, work = workload.median_s, workload.work
    num_tokens = work.num_prompt_tokens + work.num_generated_tokens
    return (
        workload.name,
        str(len(workload.requests)),
        f"{seconds:.2f}",
        f"{work.num_prompt_tokens / seconds:,.0f}",
        f"{work.num_generated_tokens / seconds:,.0f}",
        f"{num_tokens / seconds:,.0f}",
        f"{workload.peak_bytes / 2**20:,.0f}",
        f"{workload.stats['num_cached_tokens']:,}",
        f"{work.num_sharable_tokens:,}",
        f"{workload.stats['num_steps']:,}",
        f"{statistics.median(workload.execute_s) / seconds:.1%}",
        f"{work.bound_s(*ceiling) / seconds:.1%}",
    )


def _against(workload: Measured, agreement: Agreement) -> str:
    num_parted = agreement.num_rows - agreement.num_equal_rows
    parted = f"{num_parted} part"
    if num_parted:
        parted += (
            f", {agreement.num_ties} of them at a tie below {TIE:g}, "
            f"largest top-2 margin {agreement.largest_margin:.1e}"
        )
    return (
        f"{workload.name} against transformers: {workload.ratio:.1f} times as fast "
        f"({statistics.median(workload.baseline_s):.1f} s); of {agreement.num_rows} rows "
        f"{agreement.num_equal_first} have the same first token, {agreement.num_equal_rows} are "
        f"equal, {parted}"
    )


def describe(
    args: argparse.Namespace,
    llm: LLM,
    startup: Startup,
    ceiling: Ceiling,
    measured: Sequence[Measured],
) -> dict[str, Any]:
    """Everything as one JSON object."""
    packages = ["batchwright", "torch", "numpy", "numba"]
    packages += ["transformers"] if args.against else []
    return {
        "benchmark": "benchmarks.run",
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": describe_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(*packages),
        "model": args.model,
        "scale": args.scale,
        "repeats": args.repeat,
        "settings": dataclasses.asdict(llm.config),
        "startup": dataclasses.asdict(startup) | {"total_s": startup.total_s},
        "ceiling_flops_per_s": ceiling._asdict(),
        "workloads": [_describe_workload(workload, ceiling) for workload in measured],
    }


def _describe_workload(workload: Measured, ceiling: Ceiling) -> dict[str, Any]:
    seconds, work = workload.median_s, workload.work
    described: dict[str, Any] = {
        "name": workload.name,
        "num_requests": len(workload.requests),
        "num_prompt_tokens": num_prompt_tokens(workload.requests),
        "num_generated_tokens": num_output_tokens(workload.requests),
        "seconds": seconds,
        "seconds_all": workload.seconds,
        "execute_s": statistics.median(workload.execute_s),
        "prompt_tokens_per_s": work.num_prompt_tokens / seconds,
        "generated_tokens_per_s": work.num_generated_tokens / seconds,
        "total_tokens_per_s": (work.num_prompt_tokens + work.num_generated_tokens) / seconds,
        "before_bytes": workload.before_bytes,
        "peak_bytes": workload.peak_bytes,
        "num_sharable_tokens": work.num_sharable_tokens,
        "necessary_flops": work.layer_flops + work.attention_flops + work.head_flops,
        "bound_s": work.bound_s(*ceiling),
        "fraction_of_ceiling": work.bound_s(*ceiling) / seconds,
        "stats": workload.stats,
    }
    if workload.agreement is not None:
        described["transformers"] = {
            "seconds": statistics.median(workload.baseline_s),
            "seconds_all": workload.baseline_s,
            "ratio": workload.ratio,
            "peak_bytes": workload.baseline_peak_bytes,
            **dataclasses.asdict(workload.agreement),
        }
    return described


if __name__ == "__main__":
    main()
