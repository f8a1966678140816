"""Readable attention in torch: the ground truth other backends are measured against.

One row at a time, gathered and masked, scores in fp32. Level rounding: a row's bits may change
with the number of its query tokens in a step, because BLAS picks its kernel by shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchwright.attention.backend import AttentionBatch
from batchwright.attention.spec import AttentionSpec, RotaryTable
from batchwright.request import Int32Array


@dataclass(slots=True, eq=False)
class TorchKV:
    """Keys and values of one layer: [num_blocks, block_size, num_kv_heads, head_dim] each."""

    keys: torch.Tensor
    values: torch.Tensor

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks: pairs [n, 2] of (source, destination); sources are read first."""
        source, destination = torch.from_numpy(pairs.astype("int64")).T
        self.keys[destination] = self.keys[source]
        self.values[destination] = self.values[source]

    def copy_tokens(self, pairs: Int32Array) -> None:
        """Copy single tokens: pairs [n, 2] of KV slots; no source is a destination."""
        source, destination = torch.from_numpy(pairs.astype("int64")).T
        keys, values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        keys[destination], values[destination] = keys[source], values[source]


class Backend:
    """The reference backend; see `attention/backend.py` for the contract."""

    def element_bytes(self, dtype: torch.dtype, head_dim: int) -> float:
        return float(dtype.itemsize)

    def allocate(
        self, spec: AttentionSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> TorchKV:
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        return TorchKV(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))

    def rows_per_load(self, num_q_heads: int, num_kv_heads: int) -> int:
        return 1

    def plan(self, batch: AttentionBatch) -> AttentionBatch:
        return batch

    def run(
        self,
        spec: AttentionSpec,
        group: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: TorchKV,
        plan: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.from_numpy(plan.positions).long()
        if spec.rotary is not None:
            at = torch.from_numpy(plan.position_ids).long()
            q, k = rotate(q, at, spec.rotary), rotate(k, at, spec.rotary)
        slot_mapping = torch.from_numpy(plan.groups[group].slot_mapping).long()
        written = slot_mapping >= 0
        kv.keys.flatten(0, 1)[slot_mapping[written]] = k[written]
        kv.values.flatten(0, 1)[slot_mapping[written]] = v[written]
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        block_table = plan.groups[group].block_table
        bounds = plan.cu_seqlens_q.tolist()
        for row, slot in enumerate(plan.slots.tolist()):
            rows = slice(bounds[row], bounds[row + 1])
            num_keys = int(positions[rows].max()) + 1
            first_key = (
                0 if spec.window is None else max(0, int(positions[rows].min()) - spec.window + 1)
            )
            first_block, end_block = first_key // plan.block_size, -(-num_keys // plan.block_size)
            blocks = torch.from_numpy(block_table[slot, first_block:end_block]).long()
            key_positions = torch.arange(first_block * plan.block_size, num_keys)
            keys = kv.keys[blocks].flatten(0, 1)[: len(key_positions)]
            values = kv.values[blocks].flatten(0, 1)[: len(key_positions)]
            out[rows], lse[rows] = attend_dense(
                spec, q[rows], keys, values, positions[rows], key_positions
            )
        return out, lse


def attend_dense(
    spec: AttentionSpec,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q_positions: torch.Tensor,
    key_positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked attention of one row over its gathered keys.

    Args:
        q: [num_q, num_q_heads, head_dim], rotated.
        keys, values: [num_keys, num_kv_heads, head_dim], keys rotated.
        q_positions, key_positions: [num_q], [num_keys] int64.
    Returns:
        out [num_q, num_q_heads, head_dim] in q's dtype, lse [num_q, num_q_heads] fp32.
    """
    group_size = spec.num_q_heads // spec.num_kv_heads
    keys = keys.float().repeat_interleave(group_size, dim=1)
    values = values.float().repeat_interleave(group_size, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    distance = q_positions[:, None] - key_positions[None, :]
    visible = distance >= 0
    if spec.window is not None:
        visible &= distance < spec.window
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.einsum("hqk,khd->qhd", torch.exp(scores - lse[..., None]), values)
    return out.to(q.dtype), lse.T


def rotate(x: torch.Tensor, positions: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotary embedding of x [num_tokens, num_heads, head_dim]; angles and products in fp32."""
    cos, sin = table.cos[positions, None, :], table.sin[positions, None, :]
    turned, rest = x[..., : table.rotary_dim].float(), x[..., table.rotary_dim :]
    if table.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pair = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        turned = pair.flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
