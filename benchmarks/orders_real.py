"""What does the order of rows change in real runs, when KV memory is short?

The mixed job of `benchmarks.orders` runs on the model itself, with a tenth of the KV memory it
would like: first come first served with a least-recently-used cache (`lru`), the same with the
cache that knows the next use (`fcfs`), and `auto`. All in one process, in turns; every row must get
the same tokens from each. Time is given by the clock and in CPU seconds, which say more on a
machine that does other things too.

    python -m benchmarks.orders_real --scale 0.25 --repeat 3
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from typing import Any

from batchwright.request import Request, SamplingParams
from benchmarks.machine import describe_commit, describe_machine, describe_versions
from benchmarks.orders import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    Recency,
    blocks_of_largest,
    least_computed,
    mixed,
    requests_of,
    run,
)
from benchmarks.workloads import build_workloads, plain_encoder

LINES = ("lru", "fcfs", "auto")


def greedy(request: Request) -> Request:
    """The same request, drawn greedily; its seed keeps it from being folded with another."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=request.params.max_tokens,
        ignore_eos=True,
        seed=request.params.seed,
    )
    return Request(id=request.id, prompt_token_ids=request.prompt_token_ids, params=params)


def measure(name: str, requests: list[Request], kv_tokens: int) -> tuple[dict, dict]:
    """One run; returns what it took, and the tokens of every row."""
    from batchwright.llm import LLM

    order = "fcfs" if name == "lru" else name
    llm = LLM("smollm2", order=order, kv_tokens=kv_tokens, max_model_len=MAX_MODEL_LEN)
    llm.generate([requests[0].prompt_token_ids[:9].tolist()], SamplingParams(max_tokens=2))
    if name == "lru":
        Recency(llm.engine._scheduler)
    before = llm.engine.stats.num_computed_tokens
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    tokens = {r.request_id: r.outputs[0].token_ids for r in llm.engine.run(requests)}
    stats = llm.engine.stats
    measured = {
        "order": name,
        "seconds": time.perf_counter() - start_s,
        "cpu_s": time.process_time() - start_cpu_s,
        "computed_over_least": (stats.num_computed_tokens - before) / least_computed(requests),
        "preemptions": stats.num_preemptions,
    }
    llm.engine.close()
    return measured, tokens


def main() -> None:
    """Run the lines in turns, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("batchwright.plan.auto_order").setLevel(logging.INFO)
    from batchwright.text.tokenizer import load_tokenizer
    from batchwright.weights.locate import locate_model

    tokenizer = load_tokenizer(locate_model("smollm2"))
    encode = plain_encoder(tokenizer.encode)
    work = mixed(build_workloads(encode, scale=arguments.scale))
    requests = [greedy(request) for request in requests_of(work)]
    wanted = run(requests, "fcfs", 10**6, tokenizer)["most_blocks"]
    kv_tokens = max(wanted // 10, blocks_of_largest(requests)) * BLOCK_SIZE
    print(f"{len(requests)} rows, {kv_tokens:,} KV tokens of {wanted * BLOCK_SIZE:,} wanted")
    lines: list[dict[str, Any]] = []
    expected: dict[str, list[int]] = {}
    for _ in range(arguments.repeat):
        for name in LINES:
            line, tokens = measure(name, requests, kv_tokens)
            expected = expected or tokens
            assert tokens == expected, f"{name}: an order changed an answer"
            lines.append(line)
            print(
                f"{name:6} {line['seconds']:7.1f} s  {line['cpu_s']:7.1f} s of CPU  computed "
                f"{line['computed_over_least']:.3f} of the least, {line['preemptions']} preempted",
                flush=True,
            )
    for name in LINES:
        cpu_s = [line["cpu_s"] for line in lines if line["order"] == name]
        print(f"{name:6} median {statistics.median(cpu_s):.1f} s of CPU")
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.orders_real",
                "scale": arguments.scale,
                "rows": len(requests),
                "kv_tokens": kv_tokens,
                "results": lines,
                "machine": describe_machine(),
                "versions": describe_versions("torch", "numpy", "numba"),
                "commit": describe_commit(),
            }
        )
    )


if __name__ == "__main__":
    main()
