"""Section `moe`: the experts of one layer of Mixtral-8x7B (8 experts, 2 a token) in bf16.

Against the larger of two bounds: the weights of the experts that are used, read once at the copy
bandwidth, and the products at the measured matrix rate. torch: a loop over the experts with cuBLAS,
its rows known beforehand, gathering and summing left out. Weights of 1.3 GB do not fit the cache.
"""

from __future__ import annotations

from typing import Any

import torch

from batchwright.kernels.expert_product import naive
from batchwright.kernels.expert_product.triton import (
    ProductTile,
    choose_tile,
    expert_mlp,
    expert_product,
    sort_by_expert,
)
from batchwright.kernels.gated_activation.triton import gated_activation
from batchwright.models.moe import route
from benchmarks.gpu.card import Budget, Call, Timer, ceilings

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 2, 4096, 14336

TILES = (
    ProductTile(16, 128, 64, 4, 4),
    ProductTile(16, 64, 128, 4, 3),
    ProductTile(32, 128, 64, 4, 4),
    ProductTile(64, 128, 64, 4, 4),
    ProductTile(64, 256, 64, 8, 3),
    ProductTile(128, 128, 64, 4, 3),
    ProductTile(128, 256, 64, 8, 3),
)
"""Tried for the gate and up product, beside the chosen one."""


def run(timer: Timer, budget: Budget) -> dict[str, Any]:
    """All lines; `left_out` counts those that the budget did not reach."""
    limits = ceilings(timer)
    small = timer.device == "cpu"
    hidden, width = (32, 48) if small else (HIDDEN, WIDTH)
    dtype = torch.float32 if small else torch.bfloat16
    gate_up = torch.randn(NUM_EXPERTS, 2 * width, hidden, device=timer.device, dtype=dtype)
    down = torch.randn(NUM_EXPERTS, hidden, width, device=timer.device, dtype=dtype)
    lines, left_out = [], 0
    for tokens in (3,) if small else TOKENS:
        x = torch.randn(tokens, hidden, device=timer.device, dtype=dtype)
        weights, experts = route(
            torch.randn(tokens, NUM_EXPERTS, device=timer.device), TOP_K, renormalise=True
        )
        used = int(experts.unique().numel())
        num_bytes = used * (gate_up[0].nbytes + down[0].nbytes)
        flops = 2 * tokens * TOP_K * (gate_up[0].numel() + down[0].numel())
        bound = max(num_bytes / limits["copy_bytes_per_s"], flops / limits["matrix_flops_per_s"])
        calls: dict[str, Call] = {
            "block": lambda x=x, e=experts, w=weights: expert_mlp(x, e, w, gate_up, down),
            "torch loop": _torch_loop(x, experts, gate_up, down),
        }
        chosen = choose_tile(tokens * TOP_K, NUM_EXPERTS, x.element_size())
        for tile in () if small else dict.fromkeys((chosen, *TILES)):
            calls[f"gate and up, {tuple(tile)}"] = _gate_up(x, experts, gate_up, tile)
        for what, call in calls.items():
            if budget.is_spent():
                left_out += 1
                continue
            seconds, spread = timer.seconds([call])
            share = bound * (2 / 3 if what.startswith("gate") else 1) / seconds
            lines.append(
                {
                    "what": what,
                    "tokens": tokens,
                    "experts_used": used,
                    "us": seconds * 1e6,
                    "spread": spread,
                    "share_of_bound": share,
                }
            )
    return {"ceilings": limits, "lines": lines, "left_out": left_out}


def _gate_up(
    x: torch.Tensor, experts: torch.Tensor, gate_up: torch.Tensor, tile: ProductTile
) -> Call:
    rows = sort_by_expert(experts, NUM_EXPERTS)
    out = x.new_empty(len(rows.pairs), gate_up.shape[1])
    return lambda: expert_product(x, gate_up, rows, out, top_k=TOP_K, tile=tile)


def _torch_loop(
    x: torch.Tensor, experts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> Call:
    pairs, starts = naive.sort_by_expert(experts, NUM_EXPERTS)
    rows, bounds = x[pairs.long() // TOP_K], starts.tolist()
    inner = x.new_empty(len(rows), down.shape[2])
    out = torch.empty_like(rows)

    def call() -> None:
        for expert in range(NUM_EXPERTS):
            mine = slice(bounds[expert], bounds[expert + 1])
            if mine.start < mine.stop:
                both = rows[mine] @ gate_up[expert].T
                gated_activation(both, "silu", inner[mine])
                torch.mm(inner[mine], down[expert].T, out=out[mine])

    return call


def table(found: dict[str, Any]) -> str:
    """One line per call and number of tokens."""
    return "\n".join(
        f"{line['what']:40}{line['tokens']:6} tokens{line['us']:10.1f} us"
        f"{line['share_of_bound']:8.1%} of the bound"
        for line in found["lines"]
    )
