"""Attention on CPU by Numba kernels: one call per layer for the whole step, no copy of the context.

Level bits: see `kernels/paged_attention/numba.py`. Keys and values are kept in fp32 whatever the
model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from batchwright.attention.backend import AttentionBatch, view_numpy
from batchwright.attention.spec import AttentionSpec
from batchwright.kernels.aligned import aligned_zeros
from batchwright.kernels.paged_attention.layout import cache_shapes, scales_of
from batchwright.kernels.paged_attention.numba import paged_attention
from batchwright.kernels.paged_attention.plan import (
    AttentionPlan,
    LastingPlan,
    plan_attention,
    tokens_per_item,
)
from batchwright.kernels.parallel import scratch
from batchwright.kernels.rotary_kv_write.numba import rotary_kv_write
from batchwright.request import Int32Array

CacheArray = npt.NDArray[Any]


@dataclass(slots=True, eq=False)
class NumbaKV:
    """Keys and values of one layer, laid out as `kernels/paged_attention/layout.py` says."""

    keys: CacheArray
    values: CacheArray

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks: pairs [n, 2] of (source, destination); sources are read first."""
        self.keys[pairs[:, 1]] = self.keys[pairs[:, 0]]
        self.values[pairs[:, 1]] = self.values[pairs[:, 0]]

    def copy_tokens(self, pairs: Int32Array) -> None:
        """Copy single tokens: pairs [n, 2] of KV slots; no source is a destination."""
        (source, to), (offset, to_offset) = divmod(pairs.T, self.keys.shape[3])
        self.keys[to, :, :, to_offset] = self.keys[source, :, :, offset]
        self.values[to, :, to_offset] = self.values[source, :, offset]
        if self.keys.dtype == np.int8:
            scales = scales_of(self.keys)
            scales[to, :, :, to_offset] = scales[source, :, :, offset]


class _PlanKey(NamedTuple):
    """Layers for which it is the same have the same work items."""

    group: int
    window: int | None
    num_q_heads: int
    num_kv_heads: int


@dataclass(slots=True, eq=False)
class _StepPlan:
    """A step, and the kernel's work items, made when needed."""

    batch: AttentionBatch
    work: dict[_PlanKey, AttentionPlan] = field(default_factory=dict)

    def for_layer(self, spec: AttentionSpec, group: int) -> AttentionPlan:
        key = _PlanKey(group, spec.window, spec.num_q_heads, spec.num_kv_heads)
        if key not in self.work:
            self.work[key] = _make_plan(self.batch, key)
        return self.work[key]


class LastingStepPlan:
    """The work of steps of as many tokens, one after another, in memory that keeps its place.

    Args:
        batch: a step; its position ids and the groups' arrays must keep their places and follow
            what is renewed.
    """

    def __init__(self, batch: AttentionBatch) -> None:
        self.batch = batch
        self._work: dict[_PlanKey, LastingPlan] = {}

    def for_layer(self, spec: AttentionSpec, group: int) -> AttentionPlan:
        key = _PlanKey(group, spec.window, spec.num_q_heads, spec.num_kv_heads)
        if key not in self._work:
            self._work[key] = LastingPlan(_make_plan(self.batch, key), key.num_kv_heads)
        return self._work[key].plan

    def renew(self, step: AttentionBatch) -> None:
        """Become the work of another step, whose arrays need not stay."""
        for key, lasting in self._work.items():
            lasting.take_over(_make_plan(step, key))


def _make_plan(batch: AttentionBatch, key: _PlanKey) -> AttentionPlan:
    return plan_attention(
        batch.cu_seqlens_q,
        batch.slots,
        batch.positions,
        num_q_heads=key.num_q_heads,
        num_kv_heads=key.num_kv_heads,
        window=key.window,
        block_table=batch.groups[key.group].block_table,  # rows load shared keys once
        block_size=batch.block_size,
    )


class Backend:
    """The CPU backend; see `attention/backend.py` for the contract."""

    stored_dtype: type[np.generic] = np.float32

    def element_bytes(self, dtype: torch.dtype, head_dim: int) -> float:
        return 4.0

    def allocate(
        self, spec: AttentionSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> NumbaKV:
        shapes = cache_shapes(
            num_blocks,
            spec.num_kv_heads,
            spec.head_dim,
            block_size,
            has_scales=self.stored_dtype is np.int8,
        )
        return NumbaKV(*(aligned_zeros(shape, self.stored_dtype) for shape in shapes))

    def rows_per_load(self, num_q_heads: int, num_kv_heads: int) -> int:
        return tokens_per_item(num_q_heads, num_kv_heads)

    def plan(self, batch: AttentionBatch) -> _StepPlan:
        return _StepPlan(batch)

    def run(
        self,
        spec: AttentionSpec,
        group: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: NumbaKV,
        plan: _StepPlan | LastingStepPlan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = q.dtype
        queries, keys, values = (view_numpy(x.float()) for x in (q, k, v))
        table = spec.rotary
        rotary_kv_write(
            queries,
            keys,
            values,
            kv.keys,
            kv.values,
            plan.batch.position_ids,
            plan.batch.groups[group].slot_mapping,
            None if table is None else view_numpy(table.cos),
            None if table is None else view_numpy(table.sin),
            interleaved=table is not None and table.interleaved,
        )
        out = scratch(q.shape, np.float32)
        lse = scratch(q.shape[:2], np.float32)
        paged_attention(
            queries,
            kv.keys,
            kv.values,
            plan.batch.groups[group].block_table,
            plan.for_layer(spec, group),
            scale=spec.scale,
            soft_cap=spec.soft_cap,
            out=out,
            lse=lse,
        )
        return torch.from_numpy(out).to(dtype), torch.from_numpy(lse)
