"""How near paged attention on CPU comes to what the machine can do.

    python -m benchmarks.attention [--threads N] [--seconds S]

Shapes of SmolLM2-135M (9 query heads, 3 kv heads of 64, fp32, blocks of 32 keys with shuffled ids):
decoding 64 sequences, prefill of 512 tokens, and eight sequences of 64 tokens over 1,024 keys, each
with its own prefix or with a common one in shared blocks.

Limits: a step must do 4 * head_dim FLOPs per query head and visible key, at the rate of the
machine's matrix products (torch fp32, [1024, 1024], same threads); and must read its keys and
values once, at the bandwidth of memory (torch copy of 256 MiB, bytes read plus bytes written).
Decoding is bound by the second, prefill by the first. The rival is torch's
scaled_dot_product_attention on contiguous copies gathered beforehand, which is work that the paged
kernel never does.

Times are first quartiles of calls that take turns: noise only adds. Use an idle machine; the load
is in the JSON.
"""

from __future__ import annotations

import batchwright  # noqa: F401  first: it settles how OpenMP threads wait

# isort: split
import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import torch

from batchwright import kernels
from batchwright.kernels.paged_attention.layout import cache_shapes
from batchwright.kernels.paged_attention.numba import paged_attention
from batchwright.kernels.paged_attention.plan import AttentionPlan, plan_attention
from benchmarks.machine import describe_commit, describe_machine, describe_versions

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 32
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True)
class Workload:
    """Rows of a step: each `num_queries` tokens over `context` earlier keys, `shared` in common."""

    name: str
    num_rows: int
    num_queries: int
    context: int
    shared: int = 0

    @property
    def length(self) -> int:
        return self.context + self.num_queries

    @property
    def flops(self) -> int:
        keys = sum(range(self.context + 1, self.length + 1))
        return 4 * HEAD_DIM * NUM_Q_HEADS * self.num_rows * keys

    @property
    def kv_bytes(self) -> int:
        keys = self.shared + self.num_rows * (self.length - self.shared)
        return 2 * 4 * HEAD_DIM * NUM_KV_HEADS * keys


WORKLOADS = [
    Workload("decode 64 x 256", 64, 1, 256),
    Workload("decode 64 x 1024", 64, 1, 1024),
    Workload("decode 64 x 4096", 64, 1, 4096),
    Workload("decode 64 x 1088, 1024 shared", 64, 1, 1088, shared=1024),
    Workload("prefill 512 @ 0", 1, 512, 0),
    Workload("prefill 512 @ 1024", 1, 512, 1024),
    Workload("prefill 8 x 64 @ 1024", 8, 64, 1024),
    Workload("prefill 8 x 64 @ 1024, shared", 8, 64, 1024, shared=1024),
]


def paged_call(work: Workload) -> tuple[Callable[[], object], Callable[[], object]]:
    """(one layer's attention, the plan of its step) on random data."""
    rng = np.random.default_rng(0)
    num_blocks = -(-work.length // BLOCK_SIZE)
    ids = rng.permutation(work.num_rows * num_blocks).astype(np.int32)
    table = ids.reshape(work.num_rows, num_blocks)
    table[:, : work.shared // BLOCK_SIZE] = table[0, : work.shared // BLOCK_SIZE]
    shapes = cache_shapes(len(ids), NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)
    k_cache, v_cache = (rng.standard_normal(shape, np.float32) for shape in shapes)
    num_tokens = work.num_rows * work.num_queries
    q = rng.standard_normal((num_tokens, NUM_Q_HEADS, HEAD_DIM), np.float32)
    out, lse = np.empty_like(q), np.empty(q.shape[:2], np.float32)
    cu = (np.arange(work.num_rows + 1) * work.num_queries).astype(np.int32)
    slots = np.arange(work.num_rows, dtype=np.int32)
    new = np.arange(work.context, work.length, dtype=np.int32)
    positions = np.tile(new, work.num_rows)

    def plan() -> AttentionPlan:
        return plan_attention(
            cu,
            slots,
            positions,
            num_q_heads=NUM_Q_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            block_table=table,
            block_size=BLOCK_SIZE,
        )

    step = plan()

    def attend() -> None:
        paged_attention(q, k_cache, v_cache, table, step, scale=SCALE, out=out, lse=lse)

    return attend, plan


def torch_call(work: Workload) -> Callable[[], object]:
    """torch's attention on contiguous keys and values, all rows in one batch."""
    rows, n, length = work.num_rows, work.num_queries, work.length
    q = torch.randn(rows, NUM_Q_HEADS, n, HEAD_DIM)
    k, v = (torch.randn(rows, NUM_KV_HEADS, length, HEAD_DIM) for _ in range(2))
    mask = None if n == 1 else torch.ones(n, length, dtype=torch.bool).tril(work.context)

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )

    return attend


def product_call() -> Callable[[], object]:
    """The matrix product whose rate is the ceiling."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return lambda: a @ b


def copy_call() -> Callable[[], object]:
    """The copy whose bandwidth is the ceiling."""
    a, b = torch.ones(2**26), torch.empty(2**26)
    return lambda: b.copy_(a)


def interleaved_times_s(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """First quartile of each call's times, taken in turns for about `seconds` (at least thrice)."""
    times_s: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while len(times_s[0]) < 3 or time.perf_counter() < end:
        for call, kept in zip(calls, times_s, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return [float(np.quantile(kept, 0.25)) for kept in times_s]


def measure(work: Workload, seconds: float) -> dict[str, float | str]:
    """One line of the table."""
    attend, plan = paged_call(work)
    product, copy = product_call(), copy_call()
    ours, theirs, product_s, copy_s = interleaved_times_s(
        [attend, torch_call(work), product, copy], seconds
    )
    (plan_s,) = interleaved_times_s([plan], 0.05)
    flops, bytes_per_s = work.flops / ours, work.kv_bytes / ours
    return {
        "workload": work.name,
        "paged_ms": ours * 1e3,
        "torch_ms": theirs * 1e3,
        "gflops": flops / 1e9,
        "of_products": flops / (2 * 1024**3 / product_s),
        "gbytes_per_s": bytes_per_s / 1e9,
        "of_copy": bytes_per_s / (2 * 2**28 / copy_s),
        "plan_us": plan_s * 1e6,
    }


def main() -> None:
    """Print the table and then one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--seconds", type=float, default=3.0, help="per workload")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernels.set_num_threads(arguments.threads)
    print(f"{'workload':32}    paged    torch  GFLOP/s  of products    GB/s  of copy     plan")
    rows = []
    for work in WORKLOADS:
        row = measure(work, arguments.seconds)
        rows.append(row)
        print(
            "{workload:32} {paged_ms:5.2f} ms {torch_ms:5.2f} ms {gflops:8.1f} {of_products:12.2f}"
            " {gbytes_per_s:7.1f} {of_copy:8.2f} {plan_us:5.0f} us".format(**row)
        )
    about = {
        "benchmark": "attention",
        "threads": arguments.threads,
        "machine": describe_machine(),
        "versions": describe_versions("torch", "numpy", "numba"),
        "commit": describe_commit(),
    }
    print(json.dumps(about | {"results": rows}))


if __name__ == "__main__":
    main()
