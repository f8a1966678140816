"""Row-wise CPU kernels against torch's operations: RMS norm, gated activation, rotary + KV write.

    python -m benchmarks.rowwise_kernels [--threads N] [--seconds S]

Widths of SmolLM2-135M (hidden 576, intermediate 1536, 9 + 3 heads of 64) at 1, 8, 64 and 512 rows.
All are bound by memory or cache bandwidth at many rows, and by the cost of a call at few; calls
from Python are timed as the engine makes them. torch's side is what a plain model does: several
operations, each of them parallel. Rotary has no torch time for the write into blocks, only for the
rotation. Times are first quartiles of calls that take turns.
"""

from __future__ import annotations

import batchwright  # noqa: F401  first: it settles how OpenMP threads wait

# isort: split
import argparse
import json
from collections.abc import Callable

import numba
import numpy as np
import torch

from batchwright import kernels
from batchwright.kernels.gated_activation import naive as activation_naive
from batchwright.kernels.gated_activation.numba import gated_activation
from batchwright.kernels.paged_attention.layout import cache_shapes
from batchwright.kernels.rms_norm import naive as norm_naive
from batchwright.kernels.rms_norm.numba import rms_norm
from batchwright.kernels.rotary_kv_write.naive import rotate
from batchwright.kernels.rotary_kv_write.numba import rotary_kv_write
from benchmarks.attention import interleaved_times_s
from benchmarks.machine import describe_commit, describe_machine, describe_versions

HIDDEN, INTERMEDIATE, HEAD_DIM = 576, 1536, 64
NUM_ROWS = (1, 8, 64, 512)
Pair = tuple[Callable[[], object], Callable[[], object]]


def norm_calls(num_rows: int) -> Pair:
    """(kernel, torch) for x += residual; norm."""
    x, residual, weight = (torch.randn(n, HIDDEN) for n in (num_rows, num_rows, 1))
    out = torch.empty_like(x)
    arrays = x.numpy(), weight[0].numpy(), out.numpy(), residual.numpy()

    def fast() -> None:
        rms_norm(arrays[0], arrays[1], 1e-5, arrays[2], residual=arrays[3])

    return fast, lambda: norm_naive.rms_norm(x, weight[0], 1e-5, residual=residual)


def activation_calls(num_rows: int) -> Pair:
    """(kernel, torch) for silu(gate) * up."""
    x = torch.randn(num_rows, 2 * INTERMEDIATE)
    arrays = x.numpy(), np.empty((num_rows, INTERMEDIATE), np.float32)
    return (
        lambda: gated_activation(arrays[0], "silu", arrays[1]),
        lambda: activation_naive.gated_activation(x, "silu"),
    )


def rotary_calls(num_rows: int) -> Pair:
    """(kernel, torch) for rotation of q and k and, in the kernel, the write of k and v."""
    num_blocks = num_rows // 32 + 1
    caches = [np.zeros(shape, np.float32) for shape in cache_shapes(num_blocks, 3, HEAD_DIM, 32)]
    qkv = torch.randn(num_rows, 15, HEAD_DIM)
    q, k, v = qkv[:, :9], qkv[:, 9:12], qkv[:, 12:]
    cos, sin = torch.rand(1024, HEAD_DIM // 2), torch.rand(1024, HEAD_DIM // 2)
    positions = torch.arange(num_rows, dtype=torch.int32)
    arrays = [x.numpy() for x in (q, k, v)]
    tables = [x.numpy() for x in (positions, positions, cos, sin)]

    def slow() -> None:
        rotate(q, cos, sin, positions)
        rotate(k, cos, sin, positions)

    return lambda: rotary_kv_write(*arrays, *caches, *tables), slow


def main() -> None:
    """Print the table and then one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--seconds", type=float, default=0.5, help="per line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernels.set_num_threads(arguments.threads)
    kinds = {"rms_norm": norm_calls, "gated_activation": activation_calls, "rotary": rotary_calls}
    results = []
    print(f"{'kernel':20} rows     kernel      torch  ratio")
    for name, make_calls in kinds.items():
        for num_rows in NUM_ROWS:
            fast_s, slow_s = interleaved_times_s(list(make_calls(num_rows)), arguments.seconds)
            row = {"kernel": name, "rows": num_rows, "us": fast_s * 1e6, "torch_us": slow_s * 1e6}
            results.append(row)
            print("{kernel:20} {rows:4} {us:7.1f} us {torch_us:7.1f} us".format(**row), end="")
            print(f" {slow_s / fast_s:6.2f}")
    about = {
        "benchmark": "rowwise_kernels",
        "threads": arguments.threads,
        "machine": describe_machine(),
        "versions": describe_versions("torch", "numpy", "numba"),
        "commit": describe_commit(),
    }
    print(json.dumps(about | {"results": results}))


if __name__ == "__main__":
    main()
