"""What is the density order worth where slots limit the batch, and not memory? On a simulated A100.

Traces 1 and 3 of `reproductions/blendserve.py`, with fewer rows, and so few slots that KV
memory is never full. The order `density` spreads prompts over the steps that there are with so many
slots; the line `slots ignored` over those that there would be if memory were full all the time, as
the paper does. Both against depth first, for several overlaps of compute and reading.

    python -m benchmarks.orders_slots --writers 40
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from batchwright.plan.order import JobFacts, Order, OrderFunction, find_order
from batchwright.plan.orders.density import density
from benchmarks.machine import describe_commit, describe_machine, describe_versions
from benchmarks.reproductions.blendserve import OVERLAPS, TRACES, make_trace, run, solve

NUM_TRACES = (0, 2)  # with much sharing and with little
SLOTS = (8, 16, 32, 64)


def ignoring_slots(job: JobFacts) -> Order:
    """By density, as if slots did not matter."""
    order = density(job)
    if order.units is None:
        return order
    return order._replace(units=order.units._replace(kv_per_slot=math.inf))


def main() -> None:
    """Run the traces, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--writers", type=int, default=40, help="rows that write, in each trace")
    parser.add_argument("--slots", type=int, nargs="*", default=SLOTS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    orders: dict[str, OrderFunction] = {
        "prefix_dfs": find_order("prefix_dfs"),
        "slots ignored": ignoring_slots,
        "density": density,
    }
    lines = []
    print(f"depth first / line, by overlap {OVERLAPS}")
    for index in NUM_TRACES:
        trace = make_trace(solve(*TRACES[index]), seed=index, num_writers=arguments.writers)
        for num_slots in arguments.slots:
            seconds = {}
            for name, order in orders.items():
                outcome = run(trace, order, max_num_seqs=num_slots)
                seconds[name] = outcome.seconds
                lines.append(
                    {
                        "trace": index + 1,
                        "slots": num_slots,
                        "order": name,
                        "seconds": outcome.seconds.tolist(),
                        "max_running": outcome.max_running,
                        "preemptions": outcome.preemptions,
                        "steps": outcome.steps,
                    }
                )
                gains = " ".join(f"{x:7.3f}" for x in seconds["prefix_dfs"] / seconds[name])
                print(f"trace {index + 1}, {num_slots:3} slots  {name:14} {gains}", flush=True)
    line = json.dumps(
        {
            "benchmark": "benchmarks.orders_slots",
            "writers": arguments.writers,
            "overlaps": OVERLAPS,
            "results": lines,
            "machine": describe_machine(),
            "versions": describe_versions("numpy"),
            "commit": describe_commit(),
        }
    )
    print(line)
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
