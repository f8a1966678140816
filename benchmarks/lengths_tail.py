"""Does it pay to start the last rows longest first? Simulated, and on the model itself.

Rows that share nothing, of lengths drawn evenly, in the order `prefix_dfs` (which is that of
arrival here) with the drain and without it; `longest_first` for comparison. Where a step costs much
the same for few rows as for many, the end in which few rows run is what the drain shortens: with W
rows at once it is at most one longest output, of a total of about rows x mean / W.

    python -m benchmarks.lengths_tail            # simulated: a CPU, and a device
    python -m benchmarks.lengths_tail --real         # SmolLM2 here, in turns
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from batchwright.clock import VirtualClock
from batchwright.engine import Engine
from batchwright.exec.sim import LinearCost, SimExecutor
from batchwright.kv.groups import KVGroup
from batchwright.plan.order import find_order
from batchwright.plan.plan import Plan
from batchwright.request import Request, SamplingParams
from batchwright.sched.scheduler import Scheduler
from benchmarks.lengths import COSTS, NoText
from benchmarks.machine import describe_commit, describe_machine, describe_versions

LINES = {"without": "prefix_dfs", "with": "prefix_dfs", "longest_first": "longest_first"}


def requests_of(num_rows: int, longest: int, seed: int) -> list[Request]:
    """Rows of 16 to 48 tokens in, 4 to `longest` out, greedy."""
    random = np.random.default_rng(seed)
    return [
        Request(
            id=str(index),
            prompt_token_ids=random.integers(1000, 9000, random.integers(16, 49)).astype(np.int32),
            params=SamplingParams(
                max_tokens=int(random.integers(4, longest + 1)),
                ignore_eos=True,
                temperature=0.0,
                seed=index,
            ),
        )
        for index in range(num_rows)
    ]


@contextmanager
def drain(is_on: bool) -> Iterator[None]:
    """The plan's drain, or none."""
    method = Plan._order_tail
    if not is_on:
        Plan._order_tail = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plan._order_tail = method  # type: ignore[method-assign]


def simulated(requests: list[Request], line: str, cost: LinearCost, at_once: int) -> dict[str, Any]:
    """One simulated run."""
    scheduler = Scheduler(
        [KVGroup(None, 10**5)],
        block_size=32,
        max_num_seqs=at_once,
        max_num_batched_tokens=512,
        max_model_len=2048,
        order=find_order(LINES[line]),
    )
    clock = VirtualClock()
    tokenizer: Any = NoText()
    engine = Engine(
        scheduler, SimExecutor(clock, cost), tokenizer, max_model_len=2048, vocab_size=2**30
    )
    with drain(line != "without"):
        assert len(list(engine.run(requests))) == len(requests)
    return {"seconds": clock.now(), "steps": engine.stats.num_steps}


def real(requests: list[Request], line: str, at_once: int) -> tuple[dict[str, Any], dict]:
    """One run of the model; returns what it took, and every row's tokens."""
    from batchwright.llm import LLM

    llm = LLM("smollm2", order=LINES[line], max_num_seqs=at_once, max_model_len=512)
    llm.generate([[9, 9, 9]], SamplingParams(max_tokens=2))
    before = llm.engine.stats.num_steps
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    with drain(line != "without"):
        tokens = {r.request_id: r.outputs[0].token_ids for r in llm.engine.run(requests)}
    took = {
        "seconds": time.perf_counter() - start_s,
        "cpu_s": time.process_time() - start_cpu_s,
        "steps": llm.engine.stats.num_steps - before,
    }
    llm.engine.close()
    return took, tokens


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    if arguments.real:
        requests, expected = requests_of(24, 64, 5), {}
        for _ in range(arguments.repeat):
            for line in ("without", "with"):
                took, tokens = real(requests, line, 8)
                expected = expected or tokens
                assert tokens == expected, "an order changed an answer"
                results.append({"line": line, "rows": 24, **took})
                print(results[-1], flush=True)
    else:
        for num_rows, at_once, longest in ((100, 32, 256), (400, 64, 512), (2000, 256, 512)):
            requests = requests_of(num_rows, longest, 5)
            for name, cost in COSTS.items():
                for line in LINES:
                    took = simulated(requests, line, cost, at_once)
                    found = {"rows": num_rows, "at_once": at_once, "cost": name, "line": line}
                    results.append(found | took)
                    print(results[-1], flush=True)
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.lengths_tail",
                "results": results,
                "machine": describe_machine(),
                "versions": describe_versions("torch", "numpy"),
                "commit": describe_commit(),
            }
        )
    )


if __name__ == "__main__":
    main()
