"""What does the order of rows change in real runs, with all the KV memory and with a tenth?

The jobs of `benchmarks.orders` run on the model itself: first come first served with a
least-recently-used cache (`lru`), `auto`, and if asked for `fcfs`, whose cache knows the next use.
All in one process, in turns; every row must get the same tokens from each. Beside the time of
`auto` stands what was predicted for it, by the simulation that `batchwright plan` does, with a
calibration just before. Time is given by the clock and in CPU seconds, which say more on a machine
that does other things too.

    python -m benchmarks.orders_real --scale 0.125 --repeat 3 [--job W3 --job mixed]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

from batchwright.bench.workloads import WorkRequest, build_workloads, plain_encoder
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
from benchmarks.predictions import predicted_s


def greedy(request: Request) -> Request:
    """The same request, drawn greedily; its seed keeps it from being folded with another."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=request.params.max_tokens,
        ignore_eos=True,
        seed=request.params.seed,
    )
    return Request(id=request.id, prompt_token_ids=request.prompt_token_ids, params=params)


def measure(name: str, requests: list[Request], kv_tokens: int | None) -> tuple[dict, dict]:
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


def predict(work: list[WorkRequest], kv_tokens: int | None) -> float:
    """Seconds that `auto` is predicted to take, on a machine as busy as it is now."""
    from batchwright.job.plan_job import cost_model
    from batchwright.opened_model import open_model

    settings = {"order": "auto", "kv_tokens": kv_tokens, "max_model_len": MAX_MODEL_LEN}
    model = open_model("smollm2", settings)
    cost = cost_model(model)
    return cost.hardware.busy * predicted_s(work, model, cost)


def run_job(
    work: list[WorkRequest], kv_tokens: int | None, lines: Sequence[str], repeat: int
) -> list[dict[str, Any]]:
    """All lines of one job in turns."""
    requests = [greedy(request) for request in requests_of(work)]
    results: list[dict[str, Any]] = []
    expected: dict[str, list[int]] = {}
    for number in range(repeat):
        predicted = predict(work, kv_tokens)
        for order in lines if number % 2 == 0 else lines[::-1]:
            line, tokens = measure(order, requests, kv_tokens)
            expected = expected or tokens
            assert tokens == expected, f"{order}: an order changed an answer"
            results.append(line | ({"predicted_s": predicted} if order == "auto" else {}))
            told = f", predicted {predicted:.1f}" if order == "auto" else ""
            print(
                f"  {order:6} {line['seconds']:7.1f} s{told}  {line['cpu_s']:7.1f} s of CPU  "
                f"computed {line['computed_over_least']:.3f} of the least, "
                f"{line['preemptions']} preempted",
                flush=True,
            )
    for order in lines:
        own = [line for line in results if line["order"] == order]
        medians = [statistics.median(line[key] for line in own) for key in ("seconds", "cpu_s")]
        print(f"  {order:6} median {medians[0]:.1f} s, {medians[1]:.1f} s of CPU", flush=True)
    return results


def main() -> None:
    """Run the jobs, print a table each, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.125)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--job", action="append", help="W1 to W4 or mixed; by default all.")
    parser.add_argument("--fcfs", action="store_true", help="Run fcfs too.")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("batchwright.plan.auto_order").setLevel(logging.INFO)
    from batchwright.text.tokenizer import load_tokenizer
    from batchwright.weights.locate import locate_model

    tokenizer = load_tokenizer(locate_model("smollm2"))
    workloads = build_workloads(plain_encoder(tokenizer.encode), scale=arguments.scale)
    jobs = workloads | {"mixed": mixed(workloads)}
    lines = ("lru", "fcfs", "auto") if arguments.fcfs else ("lru", "auto")
    results: dict[str, Any] = {}
    for name in arguments.job or jobs:
        requests = requests_of(jobs[name])
        wanted = run(requests, "fcfs", 10**6, tokenizer)["most_blocks"]
        tenth = max(wanted // 10, blocks_of_largest(requests)) * BLOCK_SIZE
        for kv_tokens in (None, tenth):
            memory = "all memory" if kv_tokens is None else f"{kv_tokens:,} KV tokens"
            title = f"{name}, {memory}"
            print(f"{title}: {len(requests)} rows, {wanted * BLOCK_SIZE:,} KV tokens wanted")
            results[title] = run_job(jobs[name], kv_tokens, lines, arguments.repeat)
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.orders_real",
                "scale": arguments.scale,
                "results": results,
                "machine": describe_machine(),
                "versions": describe_versions("torch", "numpy", "numba"),
                "commit": describe_commit(),
            }
        )
    )


if __name__ == "__main__":
    main()
