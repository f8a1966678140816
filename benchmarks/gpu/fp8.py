"""Section `fp8`: products with e4m3 weights and activations beside bf16, shapes of Llama-3-8B.

For 1 to 4,096 rows: bf16 by torch; fp8 as the engine computes it (rows quantised, then torch's
product), its quantising alone, and its product alone: with sums of fewer bits, as it is used, with
sums in fp32, and with one scale for all, which other kernels compute. Weights take turns, so that
none stays in the cache. `ceilings` has the rate of a large fp8 product too.
"""

from __future__ import annotations

from typing import Any

import torch

from batchwright.kernels.fp8_linear import naive
from batchwright.kernels.fp8_linear.triton import fp8_linear, quantize_rows
from benchmarks.gpu.card import Budget, Call, Timer, ceilings
from benchmarks.gpu.rates import CACHE_BYTES, PRODUCTS

ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
LARGE = 8192


def run(timer: Timer, budget: Budget) -> dict[str, Any]:
    """All lines; `left_out` names the products that the budget did not reach."""
    dry = timer.device == "cpu"
    found: dict[str, Any] = {"ceilings": ceilings(timer), "lines": [], "left_out": []}
    if not dry:
        found["ceilings"]["fp8_flops_per_s"] = fp8_rate(timer)
    for name, (in_features, out_features) in PRODUCTS.items():
        if budget.is_spent():
            found["left_out"].append(name)
        elif name != "head":  # which stays in bf16
            sizes = (32, 48) if dry else (in_features, out_features)
            found["lines"] += _product(timer, name, *sizes)
    return found


def fp8_rate(timer: Timer) -> float:
    """FLOP/s of a product of [8192, 8192] in e4m3, with scales by row and column."""
    x, x_scales = quantize_rows(torch.randn(LARGE, LARGE, device=timer.device).bfloat16())
    w, w_scales = quantize_rows(torch.randn(LARGE, LARGE, device=timer.device).bfloat16())
    seconds, _ = timer.seconds([lambda: _multiply(x, w, x_scales, w_scales, fast=True)])
    return 2 * LARGE**3 / seconds


def _multiply(
    x: torch.Tensor, w: torch.Tensor, x_scales: torch.Tensor, w_scales: torch.Tensor, *, fast: bool
) -> torch.Tensor:
    return torch._scaled_mm(
        x, w.T, x_scales, w_scales.T, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def _product(timer: Timer, name: str, in_features: int, out_features: int) -> list[dict[str, Any]]:
    dry = timer.device == "cpu"
    dtype = torch.float32 if dry else torch.bfloat16
    copies = 1 if dry else max(1, min(8, -(-CACHE_BYTES // (in_features * out_features))))
    wide = [
        torch.randn(out_features, in_features, device=timer.device, dtype=dtype)
        for _ in range(copies)
    ]
    narrow = [naive.quantize_rows(weight) for weight in wide]
    lines = []
    for rows in (3,) if dry else ROWS:
        x = torch.randn(rows, in_features, device=timer.device, dtype=dtype)
        ways: dict[str, list[Call]] = {
            "bf16": [lambda x=x, w=w: x @ w.T for w in wide],  # type: ignore[misc]
            "quantise": [lambda x=x: quantize_rows(x)],  # type: ignore[misc]
        }
        if not dry:
            x8, x_scales = quantize_rows(x)
            ways["fp8"] = [lambda x=x, w=w: fp8_linear(x, *w) for w in narrow]  # type: ignore[misc]
            for fast in (True, False):
                ways["product" if fast else "product, sums in fp32"] = [
                    lambda x=x8, w=w, s=s, xs=x_scales, f=fast: _multiply(  # type: ignore[misc]
                        x, w, xs, s, fast=f
                    )
                    for w, s in narrow
                ]
            one = torch.ones(1, 1, device=timer.device)
            ways["product, one scale"] = [
                lambda x=x8, w=w, one=one: _multiply(x, w, one, one, fast=True)  # type: ignore[misc]
                for w, _ in narrow
            ]
        times = {way: 1e6 * timer.seconds(calls)[0] for way, calls in ways.items()}
        lines.append({"product": name, "rows": rows, "us": times})
    return lines


def table(found: dict[str, Any]) -> str:
    """A line for each product and number of rows."""
    lines = [f"{name}: {value:.4g}" for name, value in found["ceilings"].items()]
    for line in found["lines"]:
        times = ", ".join(f"{way} {us:.1f}" for way, us in line["us"].items())
        lines.append(f"{line['product']:8}{line['rows']:6} rows, us: {times}")
    return "\n".join(lines)
