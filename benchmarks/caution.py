"""How careful should admission be: until the expected end of rows, or only until part of it?

Jobs of `batchwright sim` on pretended devices and a pretended CPU, in a part of the KV memory. True
lengths are known; rows are admitted as if they ended after `caution` of their output: 1 is the
forecast as it is, 0 looks only at what a row starts with. Rows that outgrow what was expected are
expected to become twice as long, and preempted when blocks run out.

Printed: time relative to caution 1, and preempted rows.

    python -m benchmarks.caution
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from batchwright.job.sim_job import EngineLimits, device_machine
from batchwright.plan.cost import CostModel, Hardware, RateCurve
from batchwright.plan.model_shapes import find_model_shape
from batchwright.plan.order import find_order
from batchwright.predict import families
from batchwright.sequence import Sequence
from batchwright.simulate import EngineSizes, Simulation
from batchwright.synthetic import Workload, make_workload, named_workload
from benchmarks.machine import describe_commit, describe_machine, describe_versions

CAUTIONS = (1.0, 0.75, 0.5, 0.25, 0.0)
JOBS = ("chat", "documents", "reasoning", "mixed")
CPU = Hardware(
    name="a CPU: 0.14 TFLOP/s in products, 10 GB/s of keys",
    num_threads=1,
    layers=RateCurve((12, 64, 512), (6e10, 1.1e11, 1.4e11)),
    head=RateCurve((12, 64, 512), (6e10, 1.1e11, 1.4e11)),
    ceiling_flops_per_s=1.5e11,
    attention_flops_per_s=7e10,
    kv_bytes_per_s=1e10,
    memory_bytes_per_s=2e10,
)


def cautious(rows: Iterator[Sequence], caution: float) -> Iterator[Sequence]:
    """Rows that are expected to end early."""
    for sequence in rows:
        for one in (sequence, *sequence.siblings):
            num_output = one.max_len - one.num_prompt_tokens
            one.expected_output = num_output
            one.expected_len = one.num_prompt_tokens + max(round(caution * num_output), 1)
        yield sequence


def run(workload: Workload, engine: EngineSizes, cost: CostModel, caution: float) -> Simulation:
    """Simulate all rows."""
    rows = families(
        workload.rows, workload.columns, workload.output, np.arange(len(workload.columns))
    )
    simulation = Simulation(cautious(rows, caution), engine, cost)
    expected = simulation.scheduler.expected
    expected.estimate = lambda sequences: None  # type: ignore[method-assign]  # nobody is asked
    simulation.run()
    return simulation


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.5, help="of the rows of each job")
    parser.add_argument("--order", default="prefix_dfs")
    parser.add_argument("--rows", type=int, default=64, help="rows of the mean length that fit")
    arguments = parser.parse_args()
    shape = find_model_shape("Llama-3-8B")
    lines: list[dict[str, Any]] = []
    print(f"{'job':11}{'device':10}" + "".join(f"{caution:>16}" for caution in CAUTIONS))
    for job in JOBS:
        named = named_workload(job)
        workload = make_workload(named.parts, round(arguments.scale * named.num_rows))
        lengths = workload.columns.num_prompt + workload.output
        num_tokens = int(max(arguments.rows * lengths.mean(), 2 * lengths.max()))
        limits = EngineLimits(kv_tokens=num_tokens)
        for device in ("A100-80G", "H100", "CPU"):
            machine = device_machine("H100" if device == "CPU" else device, shape, workload, limits)
            cost = machine.cost
            if device == "CPU":
                cost = replace(cost, hardware=CPU, weight_bytes=4, kv_bytes=4)
            engine = replace(machine.engine, order=find_order(arguments.order), horizon=None)
            runs = [run(workload, engine, cost, caution) for caution in CAUTIONS]
            seconds = [one.clock.now() for one in runs]
            preempted = [one.scheduler.stats.num_preemptions for one in runs]
            lines.append(
                {
                    "job": job,
                    "device": device,
                    "kv_tokens": num_tokens,
                    "seconds": seconds,
                    "preempted": preempted,
                    "recomputed": [one.scheduler.stats.work.num_recomputed_tokens for one in runs],
                }
            )
            cells = zip(seconds, preempted, strict=True)
            text = "".join(f"{s / seconds[0]:9.3f} ({n:4})" for s, n in cells)
            print(f"{job:11}{device:10}{text}", flush=True)
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.caution",
                "arguments": vars(arguments),
                "cautions": CAUTIONS,
                "lines": lines,
                "machine": describe_machine(),
                "versions": describe_versions("numpy"),
                "commit": describe_commit(),
            }
        )
    )


if __name__ == "__main__":
    main()
