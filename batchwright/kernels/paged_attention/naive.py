"""Readable twin of paged attention: torch, one query row at a time, any float dtype."""

from __future__ import annotations

import math

import torch


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    row_slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query token over its sequence's paged keys and values.

    Args:
        q: [num_tokens, num_q_heads, head_dim], rotated.
        k_cache, v_cache: [num_blocks, num_kv_heads, head_dim, block_size] and
            [num_blocks, num_kv_heads, block_size, >= head_dim]; layout.py explains.
        block_table: [max_slots, max_blocks] int32.
        cu_seqlens_q, row_slots, positions: as in plan_attention.
        scale, window, soft_cap, sinks: as in the fast kernel and plan_attention.
    Returns:
        (out [num_tokens, num_q_heads, head_dim], lse [num_tokens, num_q_heads], natural log), in
        q's dtype.
    """
    head_dim = q.shape[2]
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=q.dtype)
    for row, slot in enumerate(row_slots.tolist()):
        for token in range(int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1])):
            end = int(positions[token]) + 1
            start = 0 if window is None else max(0, end - window)
            k, v = _gather(k_cache, v_cache, block_table[slot], start, end)
            out[token], lse[token] = _attend(
                q[token], k.to(q.dtype), v[..., :head_dim].to(q.dtype), scale, soft_cap, sinks
            )
    return out, lse


def _gather(
    k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor, start: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at positions [start, end): each [end - start, num_kv_heads, dim]."""
    block_size = k_cache.shape[3]
    keys = torch.arange(start, end)
    blocks, offsets = table[keys // block_size].long(), keys % block_size
    return k_cache[blocks, :, :, offsets], v_cache[blocks, :, offsets]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: q [num_q_heads, head_dim] over k, v [num_keys, num_kv_heads, head_dim]."""
    group = q.shape[0] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,khd->hk", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(q.dtype)[:, None]], dim=1)
    lse = torch.logsumexp(logits, dim=1) if logits.shape[1] else q.new_full((len(q),), -math.inf)
    weights = torch.exp(scores - lse[:, None])
    return torch.einsum("hk,khd->hd", weights, v), lse


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over two disjoint key sets into attention over their union.

    Args:
        out_a, out_b: [num_tokens, num_q_heads, head_dim], already normalised.
        lse_a, lse_b: [num_tokens, num_q_heads], natural log of the score sum. A sink belongs to
            one of the two sets, never to both.
    Returns:
        (out, lse) with the same shapes and dtypes as out_a, lse_a.

    Exact up to rounding. An empty set has lse = -inf and is ignored. Source: arXiv:2402.05099.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    safe = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)
    weight_a, weight_b = torch.exp(lse_a - safe), torch.exp(lse_b - safe)
    return out_a * weight_a[..., None] + out_b * weight_b[..., None], lse
