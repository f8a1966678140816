"""What shared prefixes save in a step's attention: not shared, shared loads, or matrix products.

    python -m benchmarks.shared_prefix [--threads N] [--seconds S]

One layer of a decode step: rows of a token each over a common prefix and a suffix of their own.
Shapes of SmolLM2-135M (9 query heads, 3 kv heads of 64) and of a larger model (32, 8, 128), fp32,
blocks of 32 keys with shuffled ids; trees of one level, and of two (half of the prefix is common
to all rows, the other half to four rows each).

- none: the paged kernel, every row loads its own keys;
- bits: the paged kernel, rows with common blocks share loads; the same bits as none;
- products: nodes of 16 rows or more by matrix products of the BLAS, merged with the paged kernel's
  attention to the rest.

Bytes are keys and values that the way loads at least, FLOPs those of all three (4 * head_dim per
query head and key). Times are first quartiles of calls that take turns. With one thread they are
CPU time of the thread, so that other processes disturb less; with more, wall time.
"""

from __future__ import annotations

import batchwright  # noqa: F401  first: it settles how OpenMP threads wait

# isort: split
import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batchwright import kernels
from batchwright.kernels.paged_attention.layout import cache_shapes
from batchwright.kernels.paged_attention.numba import paged_attention
from batchwright.kernels.paged_attention.plan import loaded_keys, plan_attention
from benchmarks.machine import describe_commit, describe_machine, describe_versions
from benchmarks.shared_prefix_products import add_nodes, find_nodes

BLOCK_SIZE = 32
MIN_ROWS = 16
"""Products take nodes of so many rows; smaller ones they lose by more."""
HEADS = {"smollm2": (9, 3, 64), "large": (32, 8, 128)}
CASES = [
    (rows, prefix, suffix, levels)
    for rows, prefix, suffix, levels in (
        (1, 1024, 64, 1),
        (4, 1024, 64, 1),
        (8, 1024, 64, 1),
        (16, 1024, 64, 1),
        (64, 128, 64, 1),
        (64, 512, 64, 1),
        (64, 1024, 0, 1),
        (64, 1024, 64, 1),
        (64, 1024, 512, 1),
        (64, 4096, 64, 1),
        (256, 1024, 64, 1),
        (64, 1024, 64, 2),
        (64, 4096, 64, 2),
    )
]


@dataclass(frozen=True)
class Tree:
    """Rows of a decode step; `suffix` own keys each, besides the new token's."""

    heads: str
    num_rows: int
    prefix: int
    suffix: int
    levels: int

    @property
    def length(self) -> int:
        return self.prefix + self.suffix + 1

    @property
    def flops(self) -> int:
        num_q_heads, _, head_dim = HEADS[self.heads]
        return 4 * head_dim * num_q_heads * self.num_rows * self.length


def ways(tree: Tree) -> tuple[dict[str, Callable[[], object]], dict[str, int], dict[str, Any]]:
    """(one layer's attention in each way, keys each loads per kv head, planning of two ways)."""
    num_q_heads, num_kv_heads, head_dim = HEADS[tree.heads]
    rng = np.random.default_rng(0)
    num_blocks = -(-tree.length // BLOCK_SIZE)
    ids = rng.permutation(tree.num_rows * num_blocks).astype(np.int32)
    table = ids.reshape(tree.num_rows, num_blocks)
    common = tree.prefix // tree.levels // BLOCK_SIZE
    table[:, :common] = table[0, :common]
    if tree.levels == 2:
        for row in range(tree.num_rows):
            first = row - row % 4
            table[row, : tree.prefix // BLOCK_SIZE] = table[first, : tree.prefix // BLOCK_SIZE]
    shapes = cache_shapes(len(ids), num_kv_heads, head_dim, BLOCK_SIZE)
    k_cache, v_cache = (on_a_line(rng.standard_normal(shape, np.float32)) for shape in shapes)
    q = on_a_line(rng.standard_normal((tree.num_rows, num_q_heads, head_dim), np.float32))
    out, lse = on_a_line(np.zeros_like(q)), np.empty(q.shape[:2], np.float32)
    where = (
        np.arange(tree.num_rows + 1, dtype=np.int32),
        np.arange(tree.num_rows, dtype=np.int32),
        np.full(tree.num_rows, tree.length - 1, np.int32),
    )
    heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads}
    blocks = {"block_table": table, "block_size": BLOCK_SIZE}

    def plan_bits() -> Any:
        return plan_attention(*where, **heads, **blocks)

    def plan_products() -> Any:
        return find_nodes(*where[1:], **heads, **blocks, min_rows=MIN_ROWS)

    none, bits = plan_attention(*where, **heads), plan_bits()
    nodes, rest = plan_products()
    scale = head_dim**-0.5
    tensors = [torch.from_numpy(x) for x in (q, out, lse)]

    def paged(plan: Any) -> None:
        paged_attention(q, k_cache, v_cache, table, plan, scale=scale, out=out, lse=lse)

    def by_products() -> None:
        paged(rest)
        add_nodes(
            tensors[0], k_cache, v_cache, table, nodes, scale=scale,
            out=tensors[1], lse=tensors[2],
        )  # fmt: skip

    loads = {
        "none": loaded_keys(none),
        "bits": loaded_keys(bits),
        "products": loaded_keys(rest) + sum(node.end - node.start for node in nodes),
    }
    calls: dict[str, Callable[[], object]] = {
        "none": lambda: paged(none),
        "bits": lambda: paged(bits),
        "products": by_products,
    }
    return calls, loads, {"bits": plan_bits, "products": plan_products}


def on_a_line(array: Any) -> Any:
    """A copy that begins on a cache line, as the backend allocates it."""
    memory = np.empty(array.size + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    line = memory[start : start + array.size].reshape(array.shape)
    line[...] = array
    return line


def times_s(
    calls: list[Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> list[float]:
    """First quartile of each call's times, taken in turns for about `seconds`."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for call, kept in zip(calls, times, strict=True):
            start = clock()
            call()
            kept.append(clock() - start)
    return [float(np.quantile(kept, 0.25)) for kept in times]


def measure(tree: Tree, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """One line of the table."""
    calls, loads, plans = ways(tree)
    _, num_kv_heads, head_dim = HEADS[tree.heads]
    product = torch.randn(192, 128), torch.randn(128, 1024)
    names = [*calls, *(f"plan_{name}" for name in plans), "product"]
    timed = [*calls.values(), *plans.values(), lambda: product[0] @ product[1]]
    found = dict(zip(names, times_s(timed, seconds, clock), strict=True))
    row: dict[str, Any] = {
        "heads": tree.heads,
        "rows": tree.num_rows,
        "prefix": tree.prefix,
        "suffix": tree.suffix,
        "levels": tree.levels,
        "product_gflop_per_s": 2 * 192 * 128 * 1024 / found["product"] / 1e9,
        "plan_bits_us": found["plan_bits"] * 1e6,
        "plan_products_us": found["plan_products"] * 1e6,
    }
    for name in calls:
        row[f"{name}_ms"] = found[name] * 1e3
        row[f"{name}_gflop_per_s"] = tree.flops / found[name] / 1e9
        row[f"{name}_loaded_mb"] = loads[name] * 2 * 4 * num_kv_heads * head_dim / 1e6
    return row


def main() -> None:
    """Print the table and then one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernels.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    print("heads   rows prefix suffix levels       none       bits   products  bits/products  mm")
    rows = []
    for heads in HEADS:
        for case in CASES:
            row = measure(Tree(heads, *case), arguments.seconds, clock)
            rows.append(row)
            print(
                "{heads:8} {rows:3} {prefix:6} {suffix:6} {levels:6} {none_ms:7.2f} ms "
                "{bits_ms:7.2f} ms {products_ms:7.2f} ms {ratio:10.2f} "
                "{product_gflop_per_s:9.0f}".format(
                    **row, ratio=row["bits_ms"] / row["products_ms"]
                ),
                flush=True,
            )
    about = {
        "benchmark": "shared_prefix",
        "threads": arguments.threads,
        "clock": "cpu" if arguments.threads == 1 else "wall",
        "machine": describe_machine(),
        "versions": describe_versions("torch", "numpy", "numba"),
        "commit": describe_commit(),
    }
    print(json.dumps(about | {"results": rows}))


if __name__ == "__main__":
    main()
