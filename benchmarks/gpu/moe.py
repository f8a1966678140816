"""Section `moe`: the experts of one layer of Mixtral-8x7B (8 experts, 2 a token), bf16 and e4m3.

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
from batchwright.kernels.fp8_linear.triton import quantize_rows
from batchwright.kernels.gated_activation.triton import gated_activation
from batchwright.models.moe import route
from benchmarks.gpu.card import Budget, Call, Timer, ceilings
from benchmarks.gpu.fp8 import fp8_rate

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 2, 4096, 14336

TILES = {
    2: (
        ProductTile(64, 128, 64, 4, 4),
        ProductTile(64, 256, 64, 4, 4),
        ProductTile(128, 128, 64, 8, 3),
        ProductTile(128, 256, 64, 8, 4),
    ),
    1: (
        ProductTile(64, 128, 128, 4, 4),
        ProductTile(128, 128, 128, 8, 3),
        ProductTile(128, 256, 128, 8, 4),
    ),
}
"""Tried for both products, beside the chosen one, by bytes of an element; in a first run
smaller ones were too (docs/gpu.md)."""


def run(timer: Timer, budget: Budget) -> dict[str, Any]:
    """All lines; `left_out` counts those that the budget did not reach."""
    limits = ceilings(timer)
    small = timer.device == "cpu"
    hidden, width = (32, 48) if small else (HIDDEN, WIDTH)
    dtype = torch.float32 if small else torch.bfloat16
    gate_up = torch.randn(NUM_EXPERTS, 2 * width, hidden, device=timer.device, dtype=dtype)
    down = torch.randn(NUM_EXPERTS, hidden, width, device=timer.device, dtype=dtype)
    narrow: Form = gate_up, down, None
    if not small:
        narrow = _in_fp8(gate_up, down)
        limits["fp8_flops_per_s"] = fp8_rate(timer)
    lines, left_out = [], 0
    for tokens in (3,) if small else TOKENS:
        x = torch.randn(tokens, hidden, device=timer.device, dtype=dtype)
        weights, experts = route(
            torch.randn(tokens, NUM_EXPERTS, device=timer.device), TOP_K, renormalise=True
        )
        used = int(experts.unique().numel())
        numbers = gate_up[0].numel() + down[0].numel()
        flops = 2 * tokens * TOP_K * numbers
        calls: dict[str, tuple[float, Call]] = {}  # share of the bound that is its, and the call
        for size, form in ((2, (gate_up, down, None)), (1, narrow)):
            if size == 1 and small:
                continue
            rate = limits["matrix_flops_per_s" if size == 2 else "fp8_flops_per_s"]
            bound = max(used * numbers * size / limits["copy_bytes_per_s"], flops / rate)
            name = "fp8 " if size == 1 else ""
            calls[name + "block"] = bound, _block(x, experts, weights, form)
            if size == 2:
                calls["torch loop"] = bound, _torch_loop(x, experts, gate_up, down)
            chosen = choose_tile(tokens * TOP_K, NUM_EXPERTS, size)
            for tile in () if small else dict.fromkeys((chosen, *TILES[size])):
                call = _gate_up(x, experts, form, tile)
                calls[f"{name}gate and up, {tuple(tile)}"] = bound * 2 / 3, call
                if tokens >= 64:
                    call = _down(tokens, experts, form, tile, dtype)
                    calls[f"{name}down, {tuple(tile)}"] = bound / 3, call
        for what, (bound, call) in calls.items():
            if budget.is_spent():
                left_out += 1
                continue
            seconds, spread = timer.seconds([call])
            lines.append(
                {
                    "what": what,
                    "tokens": tokens,
                    "experts_used": used,
                    "us": seconds * 1e6,
                    "spread": spread,
                    "share_of_bound": bound / seconds,
                }
            )
    return {"ceilings": limits, "lines": lines, "left_out": left_out}


Form = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]
"""Weights of gate and up, and of down, and the scales of both in e4m3."""


def _in_fp8(gate_up: torch.Tensor, down: torch.Tensor) -> Form:
    values, scales = zip(*(_quantized(weight) for weight in (gate_up, down)), strict=True)
    return values[0], values[1], (scales[0], scales[1])


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert by expert, for its fp32 copies are large."""
    parts = [quantize_rows(one) for one in weight]
    return torch.stack([part[0] for part in parts]), torch.stack([part[1][:, 0] for part in parts])


def _block(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, form: Form) -> Call:
    gate_up, down, scales = form
    return lambda: expert_mlp(x, experts, weights, gate_up, down, scales=scales)


def _gate_up(x: torch.Tensor, experts: torch.Tensor, form: Form, tile: ProductTile) -> Call:
    gate_up, _, scales = form
    rows = sort_by_expert(experts, NUM_EXPERTS)
    out = x.new_empty(len(rows.pairs), gate_up.shape[1])
    if scales is None:
        return lambda: expert_product(x, gate_up, rows, out, top_k=TOP_K, tile=tile)
    x8, x_scales = quantize_rows(x)
    both = x_scales, scales[0]
    return lambda: expert_product(x8, gate_up, rows, out, top_k=TOP_K, scales=both, tile=tile)


def _down(
    tokens: int, experts: torch.Tensor, form: Form, tile: ProductTile, dtype: torch.dtype
) -> Call:
    _, down, scales = form
    rows = sort_by_expert(experts, NUM_EXPERTS)
    inner = torch.randn(len(rows.pairs), down.shape[2], device=down.device, dtype=dtype)
    out = inner.new_empty(len(inner), down.shape[1])
    if scales is None:
        return lambda: expert_product(inner, down, rows, out, to_pairs=True, tile=tile)
    inner8, row_scales = quantize_rows(inner)
    both = row_scales, scales[1]
    return lambda: expert_product(inner8, down, rows, out, to_pairs=True, scales=both, tile=tile)


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
