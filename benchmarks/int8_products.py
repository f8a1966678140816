"""How fast are int8 products against our fp32 ones, by shape and rows?

One thread, its own time (the machine may be busy), medians of 7, the two in turns; weights come
from memory, as many of them as take 128 MB in fp32. Limits: `vpdpbusd` does four times the
multiply-adds of an fp32 instruction, and weights are a quarter of the bytes; so at most four times
as fast.

    python -m benchmarks.int8_products
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from batchwright import kernels
from batchwright.exec.product_rates import engine_products
from batchwright.kernels.int8_linear import dot_tile
from batchwright.kernels.int8_linear import numba as int8_kernel
from batchwright.plan.cost import Product
from benchmarks.machine import describe_commit, describe_machine, describe_versions

SHAPES = ((576, 960), (1536, 576), (576, 3072), (2048, 8192), (576, 49152))
ROWS = (1, 4, 16, 32, 64, 256)
WEIGHT_BYTES = 128 * 2**20
REPEATS = 7
S_PER_REPEAT = 0.02
WAYS = {"vnni": dot_tile.VNNI_512, "avx-vnni": dot_tile.VNNI_256, "avx2": dot_tile.PAIRS_256}


def seconds(call: Callable[[int], object], repeats: int) -> float:
    """Of the thread, for one call."""
    start = time.thread_time()
    for turn in range(repeats):
        call(turn)
    return (time.thread_time() - start) / repeats


def measure(in_features: int, out_features: int, way: int) -> list[dict[str, float]]:
    """A line for each number of rows."""
    size = in_features * out_features
    product = Product(in_features, out_features, max(1, min(30, WEIGHT_BYTES // (4 * size))))
    plain = engine_products(product, torch.float32)
    int8 = engine_products(product, torch.float32, "int8")[: len(plain)]
    int8_kernel.best_way_here = lambda: way
    lines = []
    for rows in ROWS:
        x = torch.randn(rows, in_features)
        repeats = max(1, int(S_PER_REPEAT * 2e11 / (2 * rows * size)))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(REPEATS + 1):
            for products, own in zip((plain, int8), times, strict=True):
                own.append(seconds(lambda i, p=products, x=x: p[i % len(p)](x), repeats))  # type: ignore[misc]
        fp32_s, int8_s = (statistics.median(own[1:]) for own in times)
        lines.append(
            {
                "rows": rows,
                "fp32_gflops": 2e-9 * rows * size / fp32_s,
                "int8_gflops": 2e-9 * rows * size / int8_s,
                "ratio": fp32_s / int8_s,
                "int8_gb_per_s": 1e-9 * size / int8_s,
            }
        )
    return lines


def main() -> None:
    """Measure, print the tables and the JSON line."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    kernels.set_num_threads(1)
    torch.set_num_threads(1)
    found = []
    print("way       inputs outputs  rows  fp32 GFLOP/s  int8 GFLOP/s  ratio  GB/s of int8 weights")
    with torch.inference_mode():
        for name, way in WAYS.items():
            for shape in SHAPES:
                for line in measure(*shape, way):
                    found.append({"way": name, "shape": shape, **line})
                    print(
                        f"{name:9} {shape[0]:6} {shape[1]:7} {line['rows']:5} "
                        f"{line['fp32_gflops']:13.0f} {line['int8_gflops']:13.0f} "
                        f"{line['ratio']:6.2f} {line['int8_gb_per_s']:8.1f}",
                        flush=True,
                    )
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.int8_products",
                "lines": found,
                "machine": describe_machine(),
                "versions": describe_versions("torch", "numpy", "numba"),
                "commit": describe_commit(),
            }
        )
    )


if __name__ == "__main__":
    main()
