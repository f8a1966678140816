"""What do two threads, or two replicas of one thread, give over one thread, on the same two cores?

    python -m benchmarks.scaling OUT.json [--rounds 1] [--scale 0.125]

SmolLM2 on the workloads W1 to W4, every way in a process of its own, in turns. Each call adds
rounds to OUT.json, so that one call need not take long, and prints the medians of all of them.
Two cores can at best halve the time. What more cores would give is predicted by
`benchmarks.more_cores`.

Memory is what the system charges to all processes of a way together, pages that several map
counted once (PSS), after the last workload.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_commit, describe_machine, describe_versions

WAYS: dict[str, dict[str, int]] = {
    "1 thread": {"num_threads": 1},
    "2 threads": {"num_threads": 2},
    "2 replicas": {"num_threads": 1, "data_parallel_size": 2},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scale", type=float, default=0.125)
    parser.add_argument("--workloads", default="W1,W2,W3,W4")
    parser.add_argument("--way", choices=WAYS, help="run it here and print its numbers")
    options = parser.parse_args()
    if options.way:
        names = options.workloads.split(",")
        print(json.dumps(run_way(WAYS[options.way], options.scale, names)))
        return
    rounds: list[dict[str, Any]] = []
    if options.out.exists():
        rounds = json.loads(options.out.read_text())["rounds"]
    for _ in range(options.rounds):
        rounds.append({way: _in_process(options, way) for way in WAYS})
        result = {
            "scale": options.scale,
            "rounds": rounds,
            "machine": describe_machine(),
            "versions": describe_versions("torch", "numpy", "numba"),
            "commit": describe_commit(),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    _print(rounds)


def _in_process(options: argparse.Namespace, way: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scaling", str(options.out)]
    command += ["--scale", str(options.scale), "--workloads", options.workloads, "--way", way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def run_way(settings: dict[str, int], scale: float, names: list[str]) -> dict[str, Any]:
    """Seconds of loading and of each workload, a digest of the answers, and memory."""
    from batchwright.bench.workloads import build_workloads, plain_encoder
    from batchwright.llm import LLM
    from batchwright.request import SamplingParams

    start_s = time.perf_counter()
    llm = LLM("smollm2", device="cpu", kv_cache_bytes=2**30, **settings)
    numbers: dict[str, Any] = {"load_s": time.perf_counter() - start_s, "seconds": {}}
    warm = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    beginnings = [list(range(first, first + 70)) for first in range(100, 900, 100)]
    llm.generate([[*one, last] for one in beginnings for last in (1, 2)], warm)
    answers = {}
    before = llm.engine.stats.num_cached_tokens
    numbers["cached_tokens"] = {}
    workloads = build_workloads(plain_encoder(llm.tokenizer.encode), scale=scale)
    for name in names:
        rows = workloads[name]
        params = [
            SamplingParams(temperature=0.0, max_tokens=row.num_output_tokens, ignore_eos=True)
            for row in rows
        ]
        start_s = time.perf_counter()
        results = llm.generate([row.prompt_token_ids for row in rows], params)
        numbers["seconds"][name] = time.perf_counter() - start_s
        answers[name] = [result.outputs[0].token_ids for result in results]
        cached = llm.engine.stats.num_cached_tokens
        numbers["cached_tokens"][name], before = cached - before, cached
    digest = hashlib.sha256(json.dumps(answers).encode())
    numbers["answers"] = digest.hexdigest()[:16]
    numbers["memory_bytes"] = _memory_bytes(llm)
    return numbers


def _memory_bytes(llm: Any) -> dict[str, int]:
    """Of this process, and of each replica."""
    replicas = getattr(llm.engine, "replicas", None)
    pids = [] if replicas is None else replicas.pids
    named = {f"replica {number}": pid for number, pid in enumerate(pids)}
    return {name: _pss(pid) for name, pid in {"this process": os.getpid(), **named}.items()}


def _pss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _print(rounds: list[dict[str, Any]]) -> None:
    answers = {one[way]["answers"] for one in rounds for way in WAYS}
    print(f"{len(rounds)} rounds; answers are {'equal' if len(answers) == 1 else 'NOT EQUAL'}")
    print(f"{'':>10} " + " ".join(f"{way:>22}" for way in WAYS))
    for name in rounds[0]["1 thread"]["seconds"]:
        cells, times = [], {}
        for way in WAYS:
            values = [one[way]["seconds"][name] for one in rounds]
            times[way] = float(np.median(values))
            spread = f"{min(values):.2f}-{max(values):.2f}"
            cells.append(f"{times[way]:6.2f} {spread:>11} {times['1 thread'] / times[way]:.2f}x")
        print(f"{name:>10} " + " ".join(f"{cell:>22}" for cell in cells))
    for what in ("load_s", "memory"):
        cells = []
        for way in WAYS:
            if what == "load_s":
                cells.append(f"{np.median([one[way]['load_s'] for one in rounds]):.1f} s")
            else:
                total = [sum(one[way]["memory_bytes"].values()) for one in rounds]
                cells.append(f"{np.median(total) / 2**20:,.0f} MiB")
        print(f"{what:>10} " + " ".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
