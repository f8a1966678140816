"""What long contexts cost on a CPU: time per token, memory, and a document that rows share.

    python -m benchmarks.long_context [--threads 2] [--unshared-rows 4] [--kv-cache-dtype int8]
        [--out JSON]

SmolLM2, greedy, made-up tokens. A row of each length is computed alone, and its steps are timed:
512 prompt tokens at a time, then 24 of one token. Resident memory is told beside what weights and
the touched keys and values take. Then 20 rows of 6,000 prompt tokens, of which the first 5,800 are
the same document, with 32 output tokens; and some of them again without sharing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchwright import LLM, SamplingParams
from batchwright.step import Step, StepResult
from batchwright.techniques import find
from benchmarks.machine import describe_commit, describe_machine, describe_versions

CONTEXTS = (512, 1024, 2048, 4096, 8000)
CHUNK = 512
NUM_DECODED = 24
DOCUMENT, PROMPT, ROWS, OUTPUT = 5_800, 6_000, 20, 32
SETTINGS: dict[str, Any] = {"max_model_len": 8192, "max_num_batched_tokens": CHUNK}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--unshared-rows", type=int, default=4)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = {
        **SETTINGS,
        "num_threads": options.threads,
        "kv_cache_dtype": options.kv_cache_dtype,
    }
    llm = LLM("smollm2", **settings)
    steps = _timed_steps(llm)
    _generate(llm, [_tokens(600, seed=0)], 3)
    contexts = [_context(llm, steps, length) for length in CONTEXTS]
    document = _document(llm, ROWS)
    alone = None
    if options.unshared_rows:
        unshared = LLM("smollm2", prefix_sharing=False, **settings)
        _generate(unshared, [_tokens(600, seed=0)], 3)
        alone = _document(unshared, options.unshared_rows)
    result = {
        "benchmark": "benchmarks.long_context",
        "threads": options.threads,
        "kv_cache_dtype": options.kv_cache_dtype,
        "contexts": contexts,
        "shared_document": document,
        "not_shared": alone,
        "machine": describe_machine(),
        "versions": describe_versions("torch", "numpy", "numba"),
        "commit": describe_commit(),
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _timed_steps(llm: LLM) -> list[tuple[int, float]]:
    """A list to which every step adds (its tokens, its seconds)."""
    steps: list[tuple[int, float]] = []
    executor = llm.engine._executor
    execute = executor.execute

    def timed(step: Step) -> StepResult:
        start = time.perf_counter()
        result = execute(step)
        steps.append((step.num_tokens, time.perf_counter() - start))
        return result  # type: ignore[return-value]

    executor.execute = timed  # type: ignore[method-assign]
    return steps


def _context(llm: LLM, steps: list[tuple[int, float]], length: int) -> dict[str, float]:
    """One row of `length` prompt tokens."""
    steps.clear()
    _generate(llm, [_tokens(length, seed=length)], NUM_DECODED + 1)
    prompt = [(tokens, seconds) for tokens, seconds in steps if tokens > 1]
    last_tokens, last_s = [one for one in prompt if one[0] == min(CHUNK, length)][-1]
    found = {
        "context": length,
        "prompt_token_ms": 1e3 * sum(s for _, s in prompt) / length,
        "last_chunk_token_ms": 1e3 * last_s / last_tokens,
        "decode_token_ms": 1e3 * statistics.median(s for tokens, s in steps if tokens == 1),
        "resident_mib": _resident_bytes() / 2**20,
        "kv_mib": _kv_bytes(llm, length + NUM_DECODED) / 2**20,
    }
    print(
        f"{length:>5} tokens: {found['prompt_token_ms']:.2f} ms a prompt token (last 512 "
        f"{found['last_chunk_token_ms']:.2f}), {found['decode_token_ms']:.1f} ms a decoded one; "
        f"resident {found['resident_mib']:.0f} MiB, keys and values {found['kv_mib']:.0f}",
        flush=True,
    )
    return found


def _document(llm: LLM, num_rows: int) -> dict[str, float]:
    """Rows that begin with the same document."""
    document = _tokens(DOCUMENT, seed=1)
    prompts = [document + _tokens(PROMPT - DOCUMENT, seed=100 + row) for row in range(num_rows)]
    before = llm.engine.stats.num_computed_tokens
    start = time.perf_counter()
    _generate(llm, prompts, OUTPUT)
    seconds = time.perf_counter() - start
    computed = llm.engine.stats.num_computed_tokens - before
    least = DOCUMENT + num_rows * (PROMPT - DOCUMENT + OUTPUT - 1)
    print(
        f"{num_rows} rows of {PROMPT:,} tokens, {DOCUMENT:,} of them shared: {seconds:.1f} s, "
        f"{computed:,} tokens computed, the least is {least:,}",
        flush=True,
    )
    return {"rows": num_rows, "seconds": seconds, "computed": computed, "least": least}


def _generate(llm: LLM, prompts: list[list[int]], num_output: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    for result in llm.generate(prompts, params):
        if result.error is not None:
            raise result.error


def _tokens(number: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1000, 40_000, number).tolist()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _kv_bytes(llm: LLM, num_tokens: int) -> int:
    shape = llm.engine.shape
    assert shape is not None
    backend = find("attention.backends", llm.config.attention).Backend()
    element_bytes = backend.element_bytes(torch.float32, shape.attention[0].head_dim)
    return int(element_bytes * shape.kv_elements_per_token() * num_tokens)


if __name__ == "__main__":
    main()
