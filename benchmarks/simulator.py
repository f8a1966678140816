"""How long does simulating take? 100,000 rows of about 1,000 tokens in every order, on one core.

A synthetic job: 16 rows to each of 6,250 prefixes of 400 tokens, 50 to 200 tokens of their own and
log-normal outputs of mean 475, on a pretended H100 with Llama-3-8B. Per order: CPU seconds of this
process, the Steps of the run, and the rounds they took, equal Steps that are charged at once being
one. `--one-by-one` makes every Step, to compare on a smaller job.

    python -m benchmarks.simulator --rows 100000
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

from batchwright.job.sim_job import EngineLimits, device_machine, orders_for
from batchwright.order_runs import run_orders
from batchwright.plan.model_shapes import find_model_shape
from batchwright.sched.scheduler import Scheduler
from batchwright.synthetic import Level, Part, make_workload, named_workload, parse_lengths
from benchmarks.machine import describe_commit, describe_machine, describe_versions

ROWS_PER_PREFIX = 16


def main() -> None:
    """Simulate, print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workload", help="One of `batchwright sim` instead, with its own rows.")
    parser.add_argument("--order", action="append")
    parser.add_argument("--one-by-one", action="store_true", help="No Steps at once.")
    arguments = parser.parse_args()
    if arguments.one_by_one:
        Scheduler.steps_until_change = lambda self: None  # type: ignore[method-assign]
    start_s = time.process_time()
    if arguments.workload:
        named = named_workload(arguments.workload)
        parts, arguments.rows = named.parts, named.num_rows
    else:
        tree = (Level(max(arguments.rows // ROWS_PER_PREFIX, 1), 400),)
        parts = (Part(parse_lengths("50-200"), parse_lengths("475~0.7"), tree),)
    workload = make_workload(parts, arguments.rows)
    make_s = time.process_time() - start_s
    shape = find_model_shape("Llama-3-8B")
    machine = device_machine("H100", shape, workload, EngineLimits())
    lines: list[dict[str, Any]] = []
    print(f"{arguments.rows:,} rows, {workload.rows.store.num_tokens:,} prompt tokens")
    print(f"{'order':14}{'CPU s':>8}{'us/row':>8}{'steps':>10}{'rounds':>10}{'simulated s':>13}")
    for name, order in orders_for(arguments.order or [], machine):
        start_s = time.process_time()
        (run,) = run_orders(
            workload.rows,
            workload.columns,
            workload.output,
            [(name, order)],
            engine=machine.engine,
            cost=machine.cost,
        )
        cpu_s = time.process_time() - start_s
        line = run.numbers() | {"cpu_s": cpu_s}
        del line["course"]
        lines.append(line)
        print(
            f"{name:14}{cpu_s:8.1f}{1e6 * cpu_s / arguments.rows:8.0f}{run.steps:10,}"
            f"{run.rounds:10,}{run.seconds:13,.1f}",
            flush=True,
        )
    result = {
        "benchmark": "benchmarks.simulator",
        "workload": arguments.workload,
        "rows": arguments.rows,
        "one_by_one": arguments.one_by_one,
        "make_cpu_s": make_s,
        "total_cpu_s": sum(line["cpu_s"] for line in lines),
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "orders": lines,
        "machine": describe_machine(),
        "versions": describe_versions("numpy"),
        "commit": describe_commit(),
    }
    print(f"all: {result['total_cpu_s']:.0f} s of CPU, {result['peak_memory_bytes'] / 1e9:.2f} GB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
