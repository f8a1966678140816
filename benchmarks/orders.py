"""What does the order of rows change: time, tokens computed, preemptions? On a simulated model.

The real engine and scheduler run jobs like W1 to W4, and a mixed one, with all the KV memory they
would like and with a tenth of it; the model is pretended, so a run takes seconds. Beside the orders
stand two foils, both first come first served: `lru` gives up the block that was used least
recently, `fewest` the one with fewest future users; every other line gives up the block whose next
use is farthest. (All keep only blocks that some waiting row will use, which helps `lru`.)

The cost of a step is a straight line (`exec/sim.LinearCost`), its parts one after the other, as on
a CPU: what an order gains here is sharing, fuller steps and a shorter tail, never overlap.

`computed` is prompt and output tokens computed, against the least there is: every distinct prompt
token once, at whole blocks, and every output token that is fed back.

    python -m benchmarks.orders --scale 2
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from batchwright.bench.workloads import WorkRequest, build_workloads, plain_encoder
from batchwright.clock import VirtualClock
from batchwright.engine import Engine
from batchwright.exec.sim import SimExecutor
from batchwright.kv.groups import KVGroup
from batchwright.plan.job_tree import JobTree, build_job_tree
from batchwright.plan.order import find_order
from batchwright.request import Int32Array, Request, SamplingParams
from batchwright.sched.scheduler import Scheduler
from batchwright.step import Step, StepResult
from batchwright.techniques import names
from batchwright.text.tokenizer import Tokenizer, load_tokenizer
from batchwright.weights.locate import locate_model
from benchmarks.machine import describe_commit, describe_machine, describe_versions

BLOCK_SIZE = 32
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, MAX_MODEL_LEN = 256, 512, 2048
FOILS = ("lru", "fewest")


def mixed(workloads: dict[str, list[WorkRequest]], seed: int = 5) -> list[WorkRequest]:
    """Rows of all four kinds, shuffled: shared and not, reading and writing."""
    rows = [row for name in sorted(workloads) for row in workloads[name]]
    random.Random(seed).shuffle(rows)
    return rows


def requests_of(work: list[WorkRequest]) -> list[Request]:
    """Requests of exactly the lengths asked for, none identical to another."""
    return [
        Request(
            id=str(index),
            prompt_token_ids=np.array(row.prompt_token_ids, np.int32),
            params=SamplingParams(max_tokens=row.num_output_tokens, ignore_eos=True, seed=index),
        )
        for index, row in enumerate(work)
    ]


class Recency:
    """Notes when the nodes of a prefix cache were used; the oldest is to be given up first."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._now = 0
        self._last_use: Int32Array = np.zeros(0, np.int32)
        cache = scheduler.books.cache
        adopt, insert = cache.adopt, cache.insert

        def noted_adopt(slot: int, nodes: Int32Array, limit: int) -> None:
            self._note(nodes)
            adopt(slot, nodes, limit)

        def noted_insert(slot: int, nodes: Int32Array, first: int, end: int) -> None:
            self._note(nodes[:end])
            insert(slot, nodes, first, end)

        cache.adopt, cache.insert = noted_adopt, noted_insert  # type: ignore[method-assign]
        cache._next_use = lambda nodes: -self._last_use[nodes].astype(np.int64)

    def _note(self, nodes: Int32Array) -> None:
        missing = int(nodes.max(initial=-1)) + 1 - len(self._last_use)
        if missing > 0:
            self._last_use = np.pad(self._last_use, (0, missing))
        self._now += 1
        self._last_use[nodes] = self._now


class MostBlocks:
    """An executor that notes how many blocks were in use."""

    def __init__(self, executor: SimExecutor, scheduler: Scheduler) -> None:
        self._executor, self._scheduler = executor, scheduler
        self.most = 0

    def execute(self, step: Step) -> StepResult:
        pool = self._scheduler.books.tables[0].pool
        self.most = max(self.most, pool.num_blocks - pool.num_free)
        return self._executor.execute(step)

    def close(self) -> None:
        pass


def run(requests: list[Request], name: str, num_blocks: int, tokenizer: Tokenizer) -> dict:
    """One job in one order or foil."""
    scheduler = Scheduler(
        [KVGroup(None, num_blocks)],
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        order=find_order("fcfs" if name in FOILS else name),
    )
    if name == "lru":
        Recency(scheduler)
    elif name == "fewest":
        scheduler.books.cache._next_use = lambda nodes: np.zeros(len(nodes), np.int64)
    clock = VirtualClock()
    executor = MostBlocks(SimExecutor(clock), scheduler)
    engine = Engine(scheduler, executor, tokenizer, max_model_len=MAX_MODEL_LEN, vocab_size=2**30)
    start_s = time.process_time()
    num_rows = sum(result.error is None for result in engine.run(requests))
    assert num_rows == len(requests)
    num_tokens = sum(len(r.prompt_token_ids) + (r.params.max_tokens or 0) for r in requests)
    return {
        "order": name,
        "simulated_s": clock.now(),
        "tokens_per_s": num_tokens / clock.now(),
        "computed_over_least": engine.stats.num_computed_tokens / least_computed(requests),
        "steps": engine.stats.num_steps,
        "preemptions": engine.stats.num_preemptions,
        "recomputed_tokens": engine.stats.num_recomputed_tokens,
        "most_blocks": executor.most,
        "scheduling_cpu_s": time.process_time() - start_s,
    }


def least_computed(requests: Iterable[Request]) -> int:
    """Tokens that any order must compute."""
    prompts = [request.prompt_token_ids for request in requests]
    rest = sum(len(prompt) % BLOCK_SIZE for prompt in prompts)
    fed = sum((request.params.max_tokens or 0) - 1 for request in requests)
    return tree_of(prompts).in_blocks(BLOCK_SIZE).num_distinct_tokens() + rest + fed


def tree_of(prompts: list[Int32Array]) -> JobTree:
    """The prefix tree of these prompts."""
    offsets = np.cumsum([0, *(len(prompt) for prompt in prompts)])
    return build_job_tree(np.concatenate(prompts), offsets)


def blocks_of_largest(requests: Iterable[Request]) -> int:
    """Blocks the largest row needs alone."""
    return max(
        -(-(len(r.prompt_token_ids) + (r.params.max_tokens or 0)) // BLOCK_SIZE) for r in requests
    )


def main() -> None:
    """Run every job in every order, print a table each, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--job", action="append", help="W1 to W4 or mixed; by default all.")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(locate_model("smollm2"))
    workloads = build_workloads(plain_encoder(tokenizer.encode), scale=arguments.scale)
    jobs = workloads | {"mixed": mixed(workloads)}
    results: dict[str, Any] = {}
    for name in arguments.job or jobs:
        requests = requests_of(jobs[name])
        for share in (1.0, 0.1):
            wanted = results[f"{name}, all memory"][0]["most_blocks"] if share < 1 else 10**6
            num_blocks = (
                wanted if share == 1 else max(int(share * wanted), blocks_of_largest(requests))
            )
            memory = "all memory" if share == 1 else f"{num_blocks * BLOCK_SIZE:,} KV tokens"
            lines = [run(requests, order, num_blocks, tokenizer) for order in lines_of()]
            results[f"{name}, {memory}"] = lines
            show(f"{name}: {len(requests)} rows, {memory}", lines)
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.orders",
                "scale": arguments.scale,
                "results": results,
                "machine": describe_machine(),
                "versions": describe_versions("numpy"),
                "commit": describe_commit(),
            }
        )
    )


def lines_of() -> list[str]:
    """The foils, then all orders, fcfs first."""
    return [*FOILS, *sorted(names("plan.orders"), key=lambda name: (name != "fcfs", name))]


def show(title: str, lines: list[dict]) -> None:
    """A table of one job."""
    print(title)
    print(f"  {'order':14}{'seconds':>9}{'tok/s':>9}{'computed':>10}{'preempted':>11}{'steps':>8}")
    for line in lines:
        print(
            f"  {line['order']:14}{line['simulated_s']:9.1f}{line['tokens_per_s']:9.0f}"
            f"{line['computed_over_least']:10.3f}{line['preemptions']:11}{line['steps']:8}"
        )


if __name__ == "__main__":
    main()
