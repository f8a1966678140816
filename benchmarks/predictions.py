"""How long does a job take, and how long was it predicted to take?

    python -m benchmarks.predictions [--scale 0.0625] [--repeat 5] [--threads 1] [--only W1,mixed]

The four workloads, and a job of mixed shape that nothing was fitted on, with forced lengths. In
every repeat the machine is calibrated, then each job is predicted by simulation and run with
`run_file`: reading rows, scheduling, computing, text, journal and files. Two times are told: by the
clock, with what the calibration says of how busy the machine is; and the thread's own time, which
others who use the machine hardly change. (With several threads, the main thread's: it spins while
it waits.) Loading, and compiling kernels before the first repeat, are left out.

Prints a line a run, then medians and how far calibrations drifted, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from batchwright.bench.workloads import WorkRequest, build_workloads, plain_encoder
from benchmarks.machine import describe_commit, describe_machine, describe_versions

if TYPE_CHECKING:
    from batchwright.llm import LLM
    from batchwright.opened_model import OpenedModel
    from batchwright.plan.cost import CostModel

MIXED_ROWS = 384
"""Rows of the mixed job at scale 1."""


class Outcome(NamedTuple):
    """One job, predicted and run; seconds."""

    job: str
    repeat: int
    predicted_own_s: float
    own_s: float
    predicted_s: float
    clock_s: float
    load_average: float


def mixed(workloads: dict[str, list[WorkRequest]], scale: float) -> list[WorkRequest]:
    """Rows of three kinds, with lengths that no workload has."""
    text = workloads["W2"][0].prompt_token_ids + workloads["W1"][0].prompt_token_ids
    rng = np.random.default_rng(7)
    requests = []
    for index in range(max(6, round(MIXED_ROWS * scale))):
        kind = index % 3
        shared = text[:384] if kind == 0 else text[:96] if kind == 1 else []
        own = rng.integers(1000, 40_000, int(rng.integers(20, 300))).tolist()
        output = int(rng.integers(2, 16) if kind == 0 else rng.integers(16, 80))
        requests.append(WorkRequest([*shared, *own], output, ("mixed",)))
    return requests


def lines(requests: Sequence[WorkRequest]) -> Iterator[dict[str, Any]]:
    """Rows for `run_file`; seeds keep equal ones from being folded."""
    for index, request in enumerate(requests):
        yield {
            "id": f"r{index}",
            "prompt_token_ids": request.prompt_token_ids,
            "max_tokens": request.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "seed": index,
        }


def predicted_s(requests: Sequence[WorkRequest], model: OpenedModel, cost: CostModel) -> float:
    """The machine's own seconds, by simulation of all rows."""
    from batchwright.job.plan_job import engine_sizes, job_order
    from batchwright.plan.job_rows import JobRows
    from batchwright.predict import predict
    from batchwright.request import Request, SamplingParams

    rows = JobRows()
    with rows.store:
        for index, request in enumerate(requests):
            prompt = np.array(request.prompt_token_ids, np.int32)
            params = SamplingParams(
                temperature=0.0, max_tokens=request.num_output_tokens, ignore_eos=True, seed=index
            )
            max_len = len(prompt) + request.num_output_tokens
            rows.add(Request(id=str(index), prompt_token_ids=prompt, params=params), max_len, index)
        columns = rows.columns()
        found = predict(
            rows,
            columns,
            columns.most_output,
            computed=np.arange(len(columns)),
            engine=engine_sizes(model, job_order(model, cost)),
            cost=cost,
            total_work_s=0.0,
        )
    assert found.is_whole
    return found.seconds


def run_s(llm: LLM, requests: Sequence[WorkRequest]) -> tuple[float, float]:
    """(own seconds, seconds by the clock) of the real job."""
    from batchwright import run_file

    with tempfile.TemporaryDirectory() as folder:
        clock_s, own_s = time.perf_counter(), time.thread_time()
        summary = run_file(llm, lines(requests), Path(folder) / "out.jsonl")
        taken = time.thread_time() - own_s, time.perf_counter() - clock_s
    assert summary.num_succeeded == len(requests)
    return taken


def main() -> None:
    """Calibrate, predict, run, in turns."""
    import os

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.0625)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", default="W1,W2,W3,W4,mixed")
    parser.add_argument("--out", type=Path, help="where the JSON goes, after every repeat")
    arguments = parser.parse_args()
    from batchwright.job.plan_job import cost_model
    from batchwright.llm import LLM
    from batchwright.opened_model import open_model

    settings = {"num_threads": arguments.threads, "order": "fcfs"}
    llm, model = LLM(arguments.model, **settings), open_model(arguments.model, settings)
    workloads = build_workloads(plain_encoder(llm.tokenizer.encode), scale=arguments.scale)
    workloads["mixed"] = mixed(workloads, arguments.scale)
    jobs = {name: workloads[name] for name in arguments.only.split(",")}
    run_s(llm, [WorkRequest(r.prompt_token_ids[:100], 3) for r in workloads["mixed"][:6]])
    cost_model(model)  # compiles what a calibration alone uses
    outcomes: list[Outcome] = []
    calibrations: list[dict[str, float]] = []
    for repeat in range(arguments.repeat):
        cost = cost_model(model)
        calibrations.append(_describe_calibration(cost))
        for name, requests in jobs.items():
            predicted = predicted_s(requests, model, cost)
            own, clock = run_s(llm, requests)
            busy = cost.hardware.busy
            one = Outcome(name, repeat, predicted, own, busy * predicted, clock, os.getloadavg()[0])
            outcomes.append(one)
            print(
                f"{name:6} own {one.own_s:7.2f} s, predicted {one.predicted_own_s:7.2f} "
                f"({one.predicted_own_s / one.own_s:.3f}); clock {one.clock_s:7.1f} s, predicted "
                f"{one.predicted_s:7.1f} ({one.predicted_s / one.clock_s:.2f}); "
                f"load {one.load_average:.1f}",
                flush=True,
            )
        if arguments.out is not None:
            _write(arguments, outcomes, calibrations)
    for name in jobs:
        own = [o.predicted_own_s / o.own_s for o in outcomes if o.job == name]
        clock = [o.predicted_s / o.clock_s for o in outcomes if o.job == name]
        print(
            f"{name:6} predicted / real, median of {len(own)}: own {statistics.median(own):.3f} "
            f"({min(own):.3f} to {max(own):.3f}), clock {statistics.median(clock):.2f} "
            f"({min(clock):.2f} to {max(clock):.2f})"
        )
    for name in calibrations[0]:
        values = [one[name] for one in calibrations]
        print(f"{name}: {min(values):.4g} to {max(values):.4g}")
    print(json.dumps(_report(arguments, outcomes, calibrations)))


def _describe_calibration(cost: CostModel) -> dict[str, float]:
    hardware = cost.hardware
    return {
        "layers_flops_per_s": hardware.layers.best,
        "layers_few_rows_flops_per_s": hardware.layers.flops_per_s[0],
        "head_flops_per_s": hardware.head.best,
        "attention_flops_per_s": hardware.attention_flops_per_s,
        "kv_bytes_per_s": hardware.kv_bytes_per_s,
        "step_s": hardware.step_s,
        "token_s": hardware.token_s,
        "draw_s": hardware.draw_s,
        "busy": hardware.busy,
    }


def _report(
    arguments: argparse.Namespace,
    outcomes: Sequence[Outcome],
    calibrations: Sequence[dict[str, float]],
) -> dict[str, Any]:
    return {
        "benchmark": "benchmarks.predictions",
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": arguments.model,
        "scale": arguments.scale,
        "threads": arguments.threads,
        "outcomes": [outcome._asdict() for outcome in outcomes],
        "calibrations": calibrations,
        "machine": describe_machine(),
        "versions": describe_versions("torch", "numpy", "numba"),
        "commit": describe_commit(),
    }


def _write(arguments: argparse.Namespace, *measured: Any) -> None:
    text = json.dumps(_report(arguments, *measured), indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
