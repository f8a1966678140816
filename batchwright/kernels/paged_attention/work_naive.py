"""Readable twin of the GPU kernel: torch, one item of a work list after the other, any device.

It reads what the kernel reads (items, entries, pieces, the merge), so that a work list, and how a
captured graph fills it up, can be tested without a card.
"""

from __future__ import annotations

import torch

from batchwright.kernels.paged_attention.device_work import DeviceWork


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: DeviceWork,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Attention as paged_attention/triton.py defines it; arguments as there, without tile shapes.

    Sums are taken in fp32, or fp64 for q of fp64.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads
    partial_out = q.new_full((work.total_partials, *q.shape[1:]), torch.nan, dtype=wide)
    partial_lse = q.new_full((work.total_partials, q.shape[1]), torch.nan, dtype=wide)
    for items in (work.narrow, work.wide):
        for first, count, line, begin, end, full_end, piece, _ in items.tolist():
            if not count:
                continue
            tokens = work.entry_tokens[first : first + count].long()
            seen_from, seen_to = work.key_start[tokens], work.key_end[tokens]
            if window is not None:
                begin = max(begin, int(seen_from.min()))
            keys = torch.arange(begin, max(begin, end), device=q.device)
            blocks, offsets = block_table[line, keys // block_size].long(), keys % block_size
            k, v = (
                _read(cache, blocks, offsets, wide, None if scales is None else scales[which])
                for which, cache in enumerate((k_cache, v_cache))
            )
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->qhk", q[tokens].to(wide), k) * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            visible = (keys < seen_to[:, None]) & (keys >= seen_from[:, None]) | (keys < full_end)
            scores = scores.masked_fill(~visible[:, None], -torch.inf)
            item_lse = (
                torch.logsumexp(scores, 2)
                if len(keys)
                else scores.new_full(scores.shape[:2], -torch.inf)
            )
            shift = item_lse.masked_fill(item_lse == -torch.inf, 0.0)
            item_out = torch.einsum("qhk,khd->qhd", torch.exp(scores - shift[..., None]), v)
            if piece < 0:
                out[tokens], lse[tokens] = _with_sinks(item_out, item_lse, sinks, out.dtype)
            else:
                at = work.partial_start[tokens].long() + piece
                partial_out[at], partial_lse[at] = item_out, item_lse
    for token in work.merged_tokens.tolist():
        if token < 0:
            continue
        start, count = int(work.partial_start[token]), int(work.num_partials[token])
        pieces = slice(start, start + count)
        total = torch.logsumexp(partial_lse[pieces], 0)
        shift = total.masked_fill(total == -torch.inf, 0.0)
        weights = torch.exp(partial_lse[pieces] - shift)
        merged = (weights[..., None] * partial_out[pieces]).sum(0)
        out[token], lse[token] = _with_sinks(merged, total, sinks, out.dtype)


def _read(
    cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
    wide: torch.dtype,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    """[num_keys, num_kv_heads, head_dim] what a cache holds there."""
    if cache.dtype == torch.float8_e4m3fn:  # torch picks no elements of these
        found = cache.view(torch.uint8)[blocks, :, offsets].view(cache.dtype).to(wide)
    else:
        found = cache[blocks, :, offsets].to(wide)
    return found if scales is None else found * scales[blocks, :, offsets, None]


def _with_sinks(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) with one more logit per head in the denominator."""
    if sinks is None:
        return out.to(dtype), lse.float()
    total = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
    return (out * torch.exp(lse - total)[..., None]).to(dtype), total.float()
