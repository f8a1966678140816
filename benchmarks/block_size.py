"""Do larger blocks of keys and values pay in real runs? W1 to W3 on SmolLM2, all memory.

Larger blocks mean fewer entries in tables and work lists, and less that is shared and more that is
rounded up. The simulation of `batchwright advise` knows the second only, so this measures both. All
sizes in turns; every row must get the same tokens from each.

    python -m benchmarks.block_size --scale 0.0625 --repeat 3
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

from batchwright.bench.workloads import build_workloads, plain_encoder
from batchwright.request import Request, SamplingParams
from benchmarks.machine import describe_commit, describe_machine, describe_versions
from benchmarks.orders import MAX_MODEL_LEN, requests_of
from benchmarks.orders_real import greedy

SIZES = (32, 64, 128)
JOBS = ("W1", "W2", "W3")


def measure(requests: list[Request], block_size: int) -> tuple[dict[str, Any], dict]:
    """One run; returns what it took, and the tokens of every row."""
    from batchwright.llm import LLM

    llm = LLM("smollm2", order="prefix_dfs", block_size=block_size, max_model_len=MAX_MODEL_LEN)
    llm.generate([requests[0].prompt_token_ids[:9].tolist()], SamplingParams(max_tokens=2))
    before = llm.engine.stats.num_computed_tokens
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    tokens = {r.request_id: r.outputs[0].token_ids for r in llm.engine.run(requests)}
    line = {
        "block_size": block_size,
        "seconds": time.perf_counter() - start_s,
        "cpu_s": time.process_time() - start_cpu_s,
        "computed": llm.engine.stats.num_computed_tokens - before,
    }
    llm.engine.close()
    return line, tokens


def main() -> None:
    """Run the jobs, print a table each, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.0625)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from batchwright.text.tokenizer import load_tokenizer
    from batchwright.weights.locate import locate_model

    tokenizer = load_tokenizer(locate_model("smollm2"))
    workloads = build_workloads(plain_encoder(tokenizer.encode), scale=arguments.scale)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in JOBS:
        requests = [greedy(request) for request in requests_of(workloads[name])]
        expected: dict[str, list[int]] = {}
        lines = results[name] = []
        for number in range(arguments.repeat):
            for size in SIZES if number % 2 == 0 else SIZES[::-1]:
                line, tokens = measure(requests, size)
                expected = expected or tokens
                assert tokens == expected, f"blocks of {size} changed an answer"
                lines.append(line)
        for size in SIZES:
            own = [line for line in lines if line["block_size"] == size]
            seconds = [line["seconds"] for line in own]
            print(
                f"{name}  blocks of {size:3}: {statistics.median(seconds):6.2f} s "
                f"({min(seconds):.2f} to {max(seconds):.2f}), {own[0]['computed']:,} computed",
                flush=True,
            )
    line = json.dumps(
        {
            "benchmark": "benchmarks.block_size",
            "scale": arguments.scale,
            "results": results,
            "machine": describe_machine(),
            "versions": describe_versions("torch", "numpy", "numba"),
            "commit": describe_commit(),
        }
    )
    print(line)
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
