"""Readable twin of shared-prefix attention: torch, any float dtype."""

from __future__ import annotations

import torch

from batchwright.kernels.paged_attention.naive import _attend, _gather, merge_attention
from batchwright.kernels.shared_prefix_attention.plan import SharedPrefixPlan


def shared_prefix_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: SharedPrefixPlan,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a step's query tokens: the rest of each, then the nodes, merged.

    Args:
        q: [num_tokens, num_q_heads, head_dim], rotated.
        k_cache, v_cache: as in paged_attention/layout.py.
        block_table: [max_slots, max_blocks] int32.
        plan: from `plan_shared_prefixes`.
        scale, soft_cap: as in paged attention.
    Returns:
        (out [num_tokens, num_q_heads, head_dim], lse [num_tokens, num_q_heads], natural log), in
        q's dtype.

    Level rounding: the same mathematics as paged attention, summed in parts. The order in which
    parts are merged changes rounding only. Source: arXiv:2402.05099.
    """
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=q.dtype)
    rest = plan.rest
    for token, slot, start, end in zip(
        *(x.tolist() for x in (rest.tokens, rest.slots, rest.key_start, rest.key_end)), strict=True
    ):
        k, v = _keys(q, k_cache, v_cache, block_table[slot], start, end)
        out[token], lse[token] = _attend(q[token], k, v, scale, soft_cap, None)
    for node in plan.nodes:
        k, v = _keys(q, k_cache, v_cache, block_table[node.slot], node.start, node.end)
        tokens = torch.from_numpy(node.tokens).long()
        parts = [_attend(one, k, v, scale, soft_cap, None) for one in q[tokens]]
        part_out, part_lse = (torch.stack(part) for part in zip(*parts, strict=True))
        out[tokens], lse[tokens] = merge_attention(out[tokens], lse[tokens], part_out, part_lse)
    return out, lse


def _keys(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    start: int,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = _gather(k_cache, v_cache, table, start, end)
    return k.to(q.dtype), v[..., : q.shape[2]].to(q.dtype)
