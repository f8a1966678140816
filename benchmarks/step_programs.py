"""What steps take as programs, and call by call; what recording one takes, and its memory.

    python -m benchmarks.step_programs [--quantize int8] [--threads 2] [--rounds 3] [--out JSON]

SmolLM2, greedy, both ways in turns in one process, the quickest of the rounds. Decoding: rows of 16
prompt tokens, 30 steps. Prompts: 32 rows of 1,088 tokens that share 1,024, 8 tokens each (W1's
shape), with how often threads went to sleep. That tokens are the same is for the tests.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from batchwright import LLM, SamplingParams
from batchwright.engine import Engine
from batchwright.exec.local import LocalExecutor
from batchwright.exec.step_programs import StepPrograms
from benchmarks.machine import describe_machine

ROWS = (1, 8, 16, 64)
RECORDED_ROWS = 8
NUM_STEPS = 30
PROMPT_TOKENS = 16
SHARED, OWN, NUM_PROMPTS, ANSWER = 1024, 64, 32, 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quantize", choices=["int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    llm = LLM("smollm2", num_threads=options.threads, max_num_seqs=64, quantize=options.quantize)
    assert isinstance(llm.engine, Engine)
    executor = llm.engine._executor
    assert isinstance(executor, LocalExecutor)
    programs = executor.programs
    assert programs is not None

    def both_ways(draw: Callable[[], list[list[int]]], num_tokens: int) -> dict[str, Any]:
        """Of each way the quickest seconds, and how often threads slept then."""
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        found: dict[str, tuple[float, int]] = {}
        llm.generate(draw(), params)
        for _ in range(options.rounds):
            for way, used in (("calls", None), ("programs", programs)):
                executor.programs = used
                prompts = draw()  # new ones, of which nothing is in the cache
                before, start = _sleeps(), time.perf_counter()
                llm.generate(prompts, params)
                run = time.perf_counter() - start, _sleeps() - before
                found[way] = min(found.get(way, run), run)
        return {way: {"seconds": s, "sleeps": n} for way, (s, n) in found.items()}

    random = np.random.default_rng(0)
    result: dict[str, Any] = {"decoding_ms": {}}
    for rows in ROWS:

        def draw(rows: int = rows) -> list[list[int]]:
            return random.integers(100, 40_000, (rows, PROMPT_TOKENS)).tolist()

        ms = {
            way: 1e3 * one["seconds"] / NUM_STEPS for way, one in both_ways(draw, NUM_STEPS).items()
        }
        result["decoding_ms"][rows] = ms
        print(f"{rows:>3} rows: {ms['calls']:.1f} ms a step, as a program {ms['programs']:.1f}")

    def prompts() -> list[list[int]]:
        shared = random.integers(100, 40_000, SHARED).tolist()
        own = random.integers(100, 40_000, (NUM_PROMPTS, OWN)).tolist()
        return [shared + row for row in own]

    result["prompts"] = both_ways(prompts, ANSWER)
    for way, one in result["prompts"].items():
        print(f"prompts, {way}: {one['seconds']:.2f} s, threads slept {one['sleeps']} times")
    result |= _recording(llm, executor)
    print(
        f"recording a step of {RECORDED_ROWS} rows takes {result['recording_ms']:.1f} ms more "
        f"than its calls; programs have {result['bytes_per_token'] / 1024:.0f} KiB a token "
        "between their calls"
    )
    result |= {"machine": describe_machine(), "settings": vars(options) | {"out": None}}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _recording(llm: LLM, executor: LocalExecutor) -> dict[str, float]:
    """What recording a step takes beside its calls, and memory between them."""
    backend: Any = executor._backend
    fresh = StepPrograms(executor._model, backend, executor._kv_layers, executor._group_of_layer)
    record, extra_s = fresh._record, []

    def timed(x: Any, batch: Any) -> Any:
        copy, attend = x.clone(), fresh._attend(backend.plan(batch))
        start = time.perf_counter()
        executor._model.through_layers(copy, attend)
        calls_s, start = time.perf_counter() - start, time.perf_counter()
        recorded = record(x, batch)
        if len(x) == RECORDED_ROWS:
            extra_s.append(time.perf_counter() - start - calls_s)
        return recorded

    fresh._record = timed  # type: ignore[method-assign]
    executor.programs = fresh
    ids = np.random.default_rng(1).integers(100, 40_000, (RECORDED_ROWS, PROMPT_TOKENS)).tolist()
    for _ in range(9):
        fresh._programs.clear()
        llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
    return {
        "recording_ms": 1e3 * sorted(extra_s)[len(extra_s) // 2],
        "bytes_per_token": fresh._memory.of(0).nbytes / max(fresh._programs),
    }


def _sleeps() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


if __name__ == "__main__":
    main()
