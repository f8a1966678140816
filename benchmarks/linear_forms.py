"""Products of all layers of SmolLM2 by how their weights are stored, and torch's, by rows.

    python -m benchmarks.linear_forms [--threads 2] [--rounds 7] [--out JSON]

Every round runs each form in turns over the weights of 30 layers, so that these come from memory;
the median counts. With `NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+f16c,+bmi,+bmi2` and
`MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2` both sides run as on a processor without
AVX-512.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from batchwright import kernels
from batchwright.exec.product_rates import timed_linear
from benchmarks.machine import describe_machine

NUM_LAYERS = 30
SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
FORMS = ("fp32", "bf16", "fp16", "int8", "int4")
ROWS = (1, 4, 8, 16, 32, 64, 128, 256)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kernels.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    ways = {form: _ours(form) for form in FORMS} | {"torch": _torchs()}
    milliseconds: dict[int, dict[str, float]] = {}
    with torch.inference_mode():
        for rows in ROWS:
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(options.rounds):
                for name, products in ways.items():
                    times[name].append(_seconds(products, rows))
            found = {name: 1e3 * statistics.median(one) for name, one in times.items()}
            milliseconds[rows] = found
            print(f"{rows:>4} rows: " + ", ".join(f"{n} {ms:.1f} ms" for n, ms in found.items()))
    if options.out:
        result = {
            "machine": describe_machine(),
            "threads": options.threads,
            "rounds": options.rounds,
            "cpu_features": os.environ.get("NUMBA_CPU_FEATURES"),
            "milliseconds": milliseconds,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


Products = list[Callable[[torch.Tensor], torch.Tensor]]


def _ours(form: str) -> Products:
    return [
        timed_linear(inputs, outputs, torch.float32, None, form)
        for _ in range(NUM_LAYERS)
        for inputs, outputs in SHAPES
    ]


def _torchs() -> Products:
    weights = [
        torch.full((outputs, inputs), 0.01) for _ in range(NUM_LAYERS) for inputs, outputs in SHAPES
    ]
    return [lambda x, weight=weight: F.linear(x, weight) for weight in weights]  # type: ignore[misc]


def _seconds(products: Products, rows: int) -> float:
    inputs = [torch.randn(rows, width) for width, _ in SHAPES]
    start = time.perf_counter()
    for index, product in enumerate(products):
        product(inputs[index % len(SHAPES)])
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
