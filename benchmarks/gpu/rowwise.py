"""Section `rowwise`: norms, rotary and KV write, and SiLU against their bound of bandwidth.

Shapes of Llama-3-8B in bf16. Bytes are what must be read and written once; the limit is the
measured copy bandwidth. Sets of tensors take turns, so that none is found in the cache.
"""

from __future__ import annotations

from typing import Any

import torch

from batchwright.kernels.gated_activation.triton import gated_activation
from batchwright.kernels.rms_norm.triton import rms_norm
from batchwright.kernels.rotary_kv_write.triton import rotary_kv_write
from benchmarks.gpu.card import Budget, Call, Timer, ceilings

TOKENS = (1, 16, 64, 256, 512, 2048, 8192)
CACHE_BYTES = 200 << 20


def run(timer: Timer, budget: Budget) -> dict[str, Any]:
    """All lines; `left_out` counts those that the budget did not reach."""
    limits = ceilings(timer)
    lines, left_out = [], 0
    small = timer.device == "cpu"
    for tokens in (3,) if small else TOKENS:
        for name, make in (("rms_norm", _norm), ("rotary_kv_write", _rotary), ("silu", _silu)):
            if budget.is_spent():
                left_out += 1
                continue
            calls, num_bytes = [], 1
            while not calls or (not small and len(calls) * num_bytes < CACHE_BYTES):
                call, num_bytes = make(tokens, timer.device, 64 if small else 4096)
                calls.append(call)
                if len(calls) == 64:
                    break
            seconds, spread = timer.seconds(calls)
            gb_per_s = 1e-9 * num_bytes / seconds
            lines.append(
                {
                    "kernel": name,
                    "tokens": tokens,
                    "us": seconds * 1e6,
                    "spread": spread,
                    "gb_per_s": gb_per_s,
                    "share_of_copy_bandwidth": 1e9 * gb_per_s / limits["copy_bytes_per_s"],
                }
            )
    return {"ceilings": limits, "lines": lines, "left_out": left_out}


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _norm(tokens: int, device: str, hidden: int) -> tuple[Call, int]:
    x, residual = (
        torch.randn(tokens, hidden, device=device, dtype=_dtype(device)) for _ in range(2)
    )
    weight, out = torch.ones(hidden, device=device, dtype=x.dtype), torch.empty_like(x)
    return lambda: rms_norm(x, weight, 1e-5, out, residual=residual), 4 * x.nbytes + weight.nbytes


def _rotary(tokens: int, device: str, hidden: int) -> tuple[Call, int]:
    heads, kv_heads = 32, 8
    size, dtype = hidden // heads, _dtype(device)
    merged = torch.randn(tokens, (heads + 2 * kv_heads) * size, device=device, dtype=dtype)
    q, k, v = merged.unflatten(1, (-1, size)).split([heads, kv_heads, kv_heads], dim=1)
    tables = [torch.randn(8192, max(size // 2, 1), device=device) for _ in range(2)]
    num_blocks = -(-tokens // 64) + 1
    caches = [
        torch.empty(num_blocks, kv_heads, 64, size, device=device, dtype=dtype) for _ in range(2)
    ]
    positions = torch.arange(tokens, device=device, dtype=torch.int32) % 8192
    slots = torch.randperm(num_blocks * 64, device=device)[:tokens].to(torch.int32)

    def call() -> None:
        rotary_kv_write(q, k, v, *caches, positions, slots, *tables)

    table_bytes = tokens * 2 * 4 * (size // 2)
    return call, (2 * q.numel() + 2 * k.numel() + 2 * v.numel()) * q.element_size() + table_bytes


def _silu(tokens: int, device: str, hidden: int) -> tuple[Call, int]:
    size = hidden * 7 // 2
    x = torch.randn(tokens, 2 * size, device=device, dtype=_dtype(device))
    out = torch.empty(tokens, size, device=device, dtype=x.dtype)
    return lambda: gated_activation(x, "silu", out), x.nbytes + out.nbytes


def table(found: dict[str, Any]) -> str:
    """One line per kernel and number of tokens."""
    return "\n".join(
        f"{line['kernel']:16}{line['tokens']:6}{line['us']:10.2f} us{line['gb_per_s']:8.0f} GB/s"
        f"{line['share_of_copy_bandwidth']:8.1%} of copy bandwidth"
        for line in found["lines"]
    )
