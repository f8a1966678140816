"""Section `rates`: what a cost model must know of a card.

- `ceilings`: copy bandwidth and the lasting rate of a large product (card.py).
- `products`: x W^T in bf16 at the shapes of Llama-3-8B for 1 to 4,096 rows of x. Few rows: the time
  of reading W; many: the matrix rate; between them, steps at multiples of the tile (128, 256).
  Weights take turns, so that none stays in the cache.
- `launches`: seconds of the host per launch, eager and by graph, of the card per small kernel in a
  graph, and of a small copy from the host that is waited for.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from batchwright.kernels.rms_norm.triton import rms_norm
from benchmarks.gpu.card import Budget, Call, Timer, ceilings

PRODUCTS = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
    "head": (4096, 128256),
}
"""(in_features, out_features) of Llama-3-8B."""
ROWS = (
    1, 2, 4, 8, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 129, 160, 192, 193, 224, 256, 257, 320,
    384, 385, 448, 512, 513, 640, 768, 1024, 1025, 1280, 1536, 2048, 2049, 3072, 4096,
)  # fmt: skip
CACHE_BYTES = 200 << 20
"""Weights that take turns have at least this many bytes together, four times the largest cache."""


def run(timer: Timer, budget: Budget) -> dict[str, Any]:
    """All rates; `left_out` names the products that the budget did not reach."""
    found: dict[str, Any] = {"ceilings": ceilings(timer), "launches": _launches(timer)}
    products, left_out = [], []
    for name, (in_features, out_features) in PRODUCTS.items():
        if budget.is_spent():
            left_out.append(name)
            continue
        products += _products(timer, name, in_features, out_features)
    return found | {"products": products, "left_out": left_out}


def _products(timer: Timer, name: str, in_features: int, out_features: int) -> list[dict[str, Any]]:
    dtype, all_rows = torch.bfloat16, ROWS
    if timer.device == "cpu":  # dry run
        in_features, out_features, dtype, all_rows = 64, 96, torch.float32, (1, 16)
    copies = max(1, min(8, -(-CACHE_BYTES // (in_features * out_features * 2))))
    weights = [
        torch.randn(out_features, in_features, device=timer.device, dtype=dtype)
        for _ in range(copies)
    ]
    lines = []
    for rows in all_rows:
        x = torch.randn(rows, in_features, device=timer.device, dtype=dtype)
        out = torch.empty(rows, out_features, device=timer.device, dtype=dtype)
        calls: list[Call] = [
            lambda x=x, w=w, out=out: torch.mm(x, w.T, out=out)  # type: ignore[misc]
            for w in weights
        ]
        seconds, spread = timer.seconds(calls)
        lines.append(
            {
                "product": name,
                "rows": rows,
                "us": seconds * 1e6,
                "spread": spread,
                "tflops": 2e-12 * rows * in_features * out_features / seconds,
                "weight_gb_per_s": 1e-9 * weights[0].nbytes / seconds,
            }
        )
    return lines


def _launches(timer: Timer) -> dict[str, float]:
    """Seconds, named for what they are of."""
    x = torch.randn(16, 128, device=timer.device)
    weight, out = torch.ones(128, device=timer.device), torch.empty_like(x)

    def host_seconds(call: Call, times: int) -> float:
        call()
        _synchronize(timer)
        start = time.perf_counter()
        for _ in range(times):
            call()
        seconds = (time.perf_counter() - start) / times
        _synchronize(timer)
        return seconds

    times = 3 if timer.device == "cpu" else 500
    found = {
        "host_s_per_torch_op": host_seconds(lambda: torch.add(x, 1.0, out=out), times),
        "host_s_per_triton_kernel": host_seconds(lambda: rms_norm(x, weight, 1e-5, out), times),
    }
    if timer.device == "cpu":
        return found
    small: list[Call] = [lambda: torch.add(x, 1.0, out=out)] * 1000
    found["card_s_per_small_torch_op_in_graph"], _ = timer.seconds(small)
    small = [lambda: rms_norm(x, weight, 1e-5, out)] * 1000
    found["card_s_per_small_triton_kernel_in_graph"], _ = timer.seconds(small)
    for num_nodes in (1, 300):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(num_nodes):
                torch.add(x, 1.0, out=out)

        def replay_and_wait(graph: torch.cuda.CUDAGraph = graph) -> None:
            graph.replay()
            torch.cuda.synchronize()

        found[f"host_s_of_replay_of_{num_nodes}"] = host_seconds(graph.replay, 100)
        found[f"s_of_replay_of_{num_nodes}_with_wait"] = host_seconds(replay_and_wait, 100)
    pinned, there = (
        torch.zeros(4096, dtype=torch.int32).pin_memory(),
        torch.zeros(4096, dtype=torch.int32, device=timer.device),
    )

    def copy_and_wait() -> None:
        there.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()

    found["s_of_16_kib_from_pinned_host_with_wait"] = host_seconds(copy_and_wait, 200)
    return found


def _synchronize(timer: Timer) -> None:
    if timer.device != "cpu":
        torch.cuda.synchronize()


def table(found: dict[str, Any]) -> str:
    """Rows against products, TFLOP/s and the weights' GB/s."""
    lines = [f"{name}: {value:.4g}" for name, value in found["ceilings"].items()]
    lines += [f"{name}: {value * 1e6:.2f} us" for name, value in found["launches"].items()]
    names = list(dict.fromkeys(line["product"] for line in found["products"]))
    lines.append("rows" + "".join(f"{name + ' TFLOP/s, GB/s':>24}" for name in names))
    for rows in dict.fromkeys(line["rows"] for line in found["products"]):
        cells = [line for line in found["products"] if line["rows"] == rows]
        lines.append(
            f"{rows:4}"
            + "".join(f"{c['tflops']:14.1f}, {c['weight_gb_per_s']:8.0f}" for c in cells)
        )
    return "\n".join(lines)
