"""Section `attention`: how near paged attention comes to what the card can do.

Shapes of Llama-3-8B in bf16 (32 query heads, 8 kv heads of 128, blocks of 64 with shuffled ids):
decoding, chunked prefill, and decoding of rows with a shared prefix, computed once for all of them
(Hydragen) and once for each. Beside them torch's scaled_dot_product_attention, and flash-attn where
it is installed, over contiguous keys. Some of the steps again with keys and values in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.attention_speed import Heads, Pool, Work, measure
from benchmarks.gpu.card import Budget, Call, Timer, ceilings

POOL_TOKENS = 4_300_000  # 17.6 GB of keys and values
DECODE = [
    Work(rows, context - 1)
    for context in (128, 1024, 4096, 16384)
    for rows in (1, 4, 16, 64, 256, 512)
]
PREFILL = [
    Work(1, 0, 512), Work(1, 0, 2048), Work(1, 0, 8192), Work(1, 4096, 512), Work(1, 16384, 512),
    Work(1, 16384, 2048), Work(16, 1024, 128), Work(4, 1024, 512), Work(32, 0, 64),
]  # fmt: skip
SHARED = [
    Work(rows, prefix + 255, 1, prefix) for prefix in (1024, 4096, 16384) for rows in (16, 64, 256)
]
EIGHT_BITS = {
    "prefill": [Work(1, 0, 2048), Work(1, 16384, 512), Work(16, 1024, 128)],
    "decode": [Work(8, 16383), Work(64, 1023), Work(256, 1023), Work(256, 4095)],
}
TINY = Heads(num_q_heads=2, num_kv_heads=1, head_dim=16, block_size=16)


def run(timer: Timer, budget: Budget) -> dict[str, Any]:
    """All lines; `left_out` counts the steps that did not fit the pool or the budget."""
    limits = ceilings(timer)
    kinds = {"prefill": PREFILL, "shared": SHARED, "decode": DECODE}
    heads, num_tokens, dtype = Heads(), POOL_TOKENS, torch.bfloat16
    if timer.device == "cpu":  # dry run
        heads, num_tokens, dtype = TINY, 6000, torch.float32
        kinds = {
            "prefill": [Work(1, 10, 3)], "shared": [Work(2, 143, 1, 128)], "decode": [Work(2, 12)],
        }  # fmt: skip
    lines, left_out = [], 0
    for cache in ("auto", "int8", "fp8"):
        pool = Pool(timer.device, num_tokens, heads, dtype, kv_cache_dtype=cache)
        for kind, works in kinds.items():
            for work in works:
                if budget.is_spent() or not pool.holds(work):
                    left_out += 1
                    continue
                lines.append({"keys": cache} | _line(timer, pool, kind, work, limits))
        kinds = kinds if timer.device == "cpu" else EIGHT_BITS
        del pool
    return {"ceilings": limits, "lines": lines, "left_out": left_out}


def _line(
    timer: Timer, pool: Pool, kind: str, work: Work, limits: dict[str, float]
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "kind": kind, "rows": work.num_rows, "new": work.num_new, "context": work.length,
        "shared": work.shared,
        "batchwright": measure(timer, pool, work, limits, pool.paged_calls(work)),
    }  # fmt: skip
    if work.shared:
        calls = pool.paged_calls(work, share=False)
        line["each row alone"] = measure(timer, pool, work, limits, calls, share=False)
    if pool.k.dtype != pool.dtype:
        return line
    rivals: dict[str, Callable[[Work], list[Call]]] = {"torch": pool.torch_calls}
    if _has_flash_attn():
        rivals["flash-attn"] = lambda work: _flash_attn_calls(pool, work)
    for name, make in rivals.items():
        try:
            calls = make(work)
            if calls:
                line[name] = measure(timer, pool, work, limits, calls, share=False)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            line[name] = {"error": str(error).splitlines()[0]}
    return line


def _has_flash_attn() -> bool:
    try:
        import flash_attn  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.is_available()


def _flash_attn_calls(pool: Pool, work: Work) -> list[Call]:
    """flash_attn_with_kvcache over contiguous keys; empty if the rows do not fit."""
    from flash_attn import flash_attn_with_kvcache

    heads, rows = pool.heads, work.num_rows
    shape = (rows, work.length, heads.num_kv_heads, heads.head_dim)
    elements = rows * work.length * heads.num_kv_heads * heads.head_dim
    q_shape = (rows, work.num_new, heads.num_q_heads, heads.head_dim)
    q = torch.randn(q_shape, device=pool.device, dtype=pool.k.dtype)

    def call(i: int) -> Call:
        part = slice(i * elements, (i + 1) * elements)
        k, v = pool.k.view(-1)[part].view(shape), pool.v.view(-1)[part].view(shape)
        return lambda: flash_attn_with_kvcache(q, k, v, causal=True)

    copies = min(pool.num_copies(work), pool.k.numel() // elements)
    return [call(i) for i in range(copies)]


def table(found: dict[str, Any]) -> str:
    """One line per step."""
    lines = [f"{name}: {value:.4g}" for name, value in found["ceilings"].items()]
    lines.append(
        f"{'':13}{'rows':>5}{'new':>6}{'context':>8}{'shared':>7}{'us':>10}{'GB/s':>7}{'TFLOP/s':>8}"
        f"{'of bound':>9}  times as long"
    )
    for line in found["lines"]:
        ours = line["batchwright"]
        others = [
            f"{name} {line[name]['us'] / ours['us']:.2f}"
            if "us" in line[name]
            else f"{name} failed"
            for name in ("each row alone", "torch", "flash-attn")
            if name in line
        ]
        lines.append(
            f"{line['kind']:8}{line['keys']:5}{line['rows']:5}{line['new']:6}{line['context']:8}{line['shared']:7}"
            f"{ours['us']:10.1f}{ours['gb_per_s']:7.0f}{ours['tflops']:8.1f}"
            f"{ours['share_of_bound']:9.1%}  {', '.join(others)}"
        )
    return "\n".join([*lines, f"left out: {found['left_out']}"])
