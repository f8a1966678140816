"""What does drawing a token cost for each kind of parameters, against torch in the same run?

    python -m benchmarks.sampling [--rows 1,8,64,256] [--repeat 15] [--logits model|flat]

Prints microseconds per row (median of the repeats, the two alternating, all threads) and one JSON
line. A row has 49,152 logits. "model" rows look like a small language model's: normal with standard
deviation 3.3, plus a head whose probabilities fall as rank^-1.5 (entropy 2 to 3 nats). "flat" rows
are standard normal, the hardest case: every token is a candidate. The bound of greedy drawing is
one reading of the row, about 8 us on one core.

torch does what its users write: softmax and multinomial; a full sort for top_p; topk for top_k. Its
times are of the operations alone, without moving anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from batchwright.kernels import get_num_threads
from batchwright.request import SamplingParams
from batchwright.sampling.state import SamplingState
from batchwright.step import NewSequence
from benchmarks.machine import describe_commit, describe_machine, describe_versions

VOCAB_SIZE = 49_152
HISTORY = 512  # tokens that penalties look at

PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "top_k 50": SamplingParams(top_k=50),
    "top_p 0.9": SamplingParams(top_p=0.9),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "top_k 50, top_p 0.9": SamplingParams(top_k=50, top_p=0.9),
    "penalties": SamplingParams(repetition_penalty=1.1, frequency_penalty=0.2),
    "greedy, logprobs 5": SamplingParams(temperature=0.0, logprobs=5),
}


def make_logits(kind: str, num_rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[num_rows, VOCAB_SIZE] float32."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((num_rows, VOCAB_SIZE), np.float32)
    if kind == "model":
        logits *= np.float32(3.3)
        head = 18.5 - 1.5 * np.log(np.arange(1, 201)) + rng.standard_normal((num_rows, 200)) / 2
        for row, values in zip(logits, head, strict=True):
            row[rng.choice(VOCAB_SIZE, 200, replace=False)] = values
    return logits


def ours(params: SamplingParams, logits: Any, history: Any) -> Callable[[], object]:
    """One call of the sampler for all rows."""
    num_rows = len(logits)
    state = SamplingState(num_rows, HISTORY + 1, VOCAB_SIZE)
    for slot in range(num_rows):
        state.add(NewSequence(slot, history[slot], HISTORY // 2, params, 17 * slot, 0, ()))
    slots = np.arange(num_rows, dtype=np.int32)
    positions = np.full(num_rows, HISTORY // 2, np.int32)
    return lambda: state.sample(logits, slots, slots, positions)


def with_torch(params: SamplingParams, logits: Any, history: Any) -> Callable[[], object]:
    """The same with torch operations, for all rows at once."""
    scores, tokens = torch.from_numpy(logits), torch.from_numpy(history).long()

    def penalized() -> torch.Tensor:
        seen = scores.gather(1, tokens)
        seen = torch.where(seen < 0, seen * 1.1, seen / 1.1)
        output = tokens[:, HISTORY // 2 :]
        counts = torch.zeros_like(scores).scatter_add_(1, output, torch.ones(output.shape))
        return scores.scatter(1, tokens, seen) - 0.2 * counts

    def draw(x: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(x.softmax(-1), 1)

    def top_k(x: torch.Tensor) -> torch.Tensor:
        values, ids = x.topk(50)
        return ids.gather(1, draw(values))

    def top_p(x: torch.Tensor) -> torch.Tensor:
        values, ids = x.sort(descending=True)
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        return ids.gather(1, torch.multinomial(probabilities * (before < 0.9), 1))

    def min_p(x: torch.Tensor) -> torch.Tensor:
        probabilities = x.softmax(-1)
        limit = 0.05 * probabilities.amax(-1, keepdim=True)
        return torch.multinomial(probabilities * (probabilities >= limit), 1)

    def top_k_top_p(x: torch.Tensor) -> torch.Tensor:
        values, ids = x.topk(50)
        return ids.gather(1, top_p(values))

    def logprobs(x: torch.Tensor) -> object:
        token = x.argmax(-1, keepdim=True)
        logprob = x.log_softmax(-1)
        rank = (x > x.gather(1, token)).sum(-1)
        return token, logprob.gather(1, token), rank, logprob.topk(5)

    run = {
        "greedy": lambda: scores.argmax(-1),
        "temperature": lambda: draw(scores / 0.8),
        "top_k 50": lambda: top_k(scores),
        "top_p 0.9": lambda: top_p(scores),
        "min_p 0.05": lambda: min_p(scores),
        "top_k 50, top_p 0.9": lambda: top_k_top_p(scores),
        "penalties": lambda: draw(penalized()),
        "greedy, logprobs 5": lambda: logprobs(scores),
    }
    return next(run[name] for name, known in PARAMS.items() if known is params)


def measure(num_rows: int, kind: str, repeat: int) -> dict[str, dict[str, float]]:
    """Microseconds per row of each case: {"ours": .., "torch": ..}, medians of alternating runs."""
    logits = make_logits(kind, num_rows)
    history = np.random.default_rng(1).integers(0, VOCAB_SIZE, (num_rows, HISTORY), np.int32)
    results = {}
    for name, params in PARAMS.items():
        contenders = {
            "ours": ours(params, logits, history),
            "torch": with_torch(params, logits, history),
        }
        times: dict[str, list[float]] = {contender: [] for contender in contenders}
        for turn in range(repeat + 1):
            for contender, run in contenders.items():
                start = time.perf_counter()
                run()
                if turn:  # the first is a warm-up, and compiles
                    times[contender].append(time.perf_counter() - start)
        results[name] = {
            contender: round(statistics.median(seconds) / num_rows * 1e6, 1)
            for contender, seconds in times.items()
        }
    return results


def main() -> None:
    """Measure, print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,8,64,256")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--logits", choices=("model", "flat"), default="model")
    options = parser.parse_args()
    row_counts = [int(rows) for rows in options.rows.split(",")]
    results = {rows: measure(rows, options.logits, options.repeat) for rows in row_counts}

    print(f"us per row, ours / torch, {options.logits} logits, {get_num_threads()} threads")
    print(f"{'':22}" + "".join(f"{rows:>11} rows" for rows in row_counts))
    for name in PARAMS:
        cells = [results[rows][name] for rows in row_counts]
        print(f"{name:22}" + "".join(f"{c['ours']:8.1f} /{c['torch']:6.0f}" for c in cells))
    line = {
        "benchmark": "sampling",
        "logits": options.logits,
        "vocab_size": VOCAB_SIZE,
        "num_threads": get_num_threads(),
        "us_per_row": results,
        "machine": describe_machine(),
        "versions": describe_versions("torch", "numba", "numpy"),
        "commit": describe_commit(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
