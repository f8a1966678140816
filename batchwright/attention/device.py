"""DeviceAttention: paged attention of whole steps on a GPU, by the kernels of kernels/*/triton.py.

The host cuts a step into work items (numpy) and the device reads them from the step's one transfer,
so a captured graph can run any step of its size. On a CPU without Triton's interpreter the twins
compute, from the same work items.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from batchwright.attention.spec import AttentionSpec, RotaryTable
from batchwright.kernels.paged_attention import work_naive
from batchwright.kernels.paged_attention.device_work import DeviceWork
from batchwright.kernels.paged_attention.shared_nodes import find_shared_nodes
from batchwright.kernels.paged_attention.tiling import choose_tiling
from batchwright.kernels.paged_attention.work_list import (
    PROGRAMS_PER_MULTIPROCESSOR,
    WorkList,
    plan_work,
)
from batchwright.kernels.rotary_kv_write import naive as rotary_naive
from batchwright.request import Int32Array

LISTS = WorkList._fields[:-2]
"""The arrays of a WorkList."""

PARTIALS_PER_TOKEN = 4
"""Partial results that captured graphs hold memory for, beside the pieces of uncut ranges."""


class AttentionKind(NamedTuple):
    """Layers that share their work items: one KV group, one window, one set of heads."""

    group: int
    window: int | None
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


class WorkSizes(NamedTuple):
    """Lengths of the lists of a captured graph; 0 narrow or merged: it has no such launch."""

    narrow: int
    wide: int
    num_entries: int
    merged: int
    total_partials: int
    max_partials: int

    def hold(self, work: WorkList) -> bool:
        """Whether a step's work fits."""
        return (
            len(work.narrow) <= self.narrow
            and len(work.wide) <= self.wide
            and len(work.entry_tokens) <= self.num_entries
            and len(work.merged_tokens) <= self.merged
            and work.total_partials <= self.total_partials
        )


class RowBatch(NamedTuple):
    """The rows of a step as attention sees them, int32; see AttentionBatch."""

    slots: Int32Array
    cu_seqlens_q: Int32Array
    positions: Int32Array  # -1: a token that sees nothing


class DeviceAttention:
    """Plans on the host and runs on the device.

    Args:
        specs: of all layers.
        group_of_layer: KV group of each.
        block_size: tokens per block.
        dtype: of queries, and of keys and values as a layer gives them.
        device: where the kernels run.
        kv_cache_dtype: see DeviceExecutor.
        num_programs: see plan_work; None: as many as the card wants.
        share_prefixes: attention to keys that rows share is computed once for them.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        group_of_layer: Sequence[int],
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache_dtype: str = "auto",
        num_programs: tuple[int, int] | None = None,
        share_prefixes: bool = True,
    ) -> None:
        self._block_size = block_size
        self._share_prefixes = share_prefixes
        self._device = device
        self.has_kernels = device.type == "cuda" or _interprets()
        architecture, self._num_programs = _card(device)
        if num_programs is not None:
            self._num_programs = num_programs
        kinds: dict[AttentionKind, int] = {}
        self._kind_of_layer = []
        for spec, group in zip(specs, group_of_layer, strict=True):
            heads = spec.num_q_heads, spec.num_kv_heads, spec.head_dim
            kind = AttentionKind(group, spec.window, *heads)
            self._kind_of_layer.append(kinds.setdefault(kind, len(kinds)))
        self.kinds = list(kinds)
        """What a step needs a work list for, one each."""
        self._tilings = [
            choose_tiling(
                kind.num_q_heads // kind.num_kv_heads,
                kind.head_dim,
                dtype.itemsize,
                architecture=architecture,
                kv_cache_dtype=kv_cache_dtype,
            )
            for kind in self.kinds
        ]
        self._tables: dict[int, RotaryTable] = {}
        for spec in specs:
            if spec.rotary is not None and id(spec.rotary) not in self._tables:
                cos, sin = (table.to(device) for table in (spec.rotary.cos, spec.rotary.sin))
                moved = RotaryTable(cos, sin, spec.rotary.interleaved)
                self._tables[id(spec.rotary)] = moved

    def work(
        self,
        rows: RowBatch,
        num_real_rows: int,
        block_tables: Sequence[Int32Array],
        *,
        share: bool = True,
    ) -> list[WorkList]:
        """The work items of a step, a list for each of `kinds`.

        Args:
            num_real_rows: of `rows`; those after them fill a graph up.
            block_tables: on the host, per KV group.
            share: False: no keys are shared, so there are fewer items.
        """
        lists = []
        real = slice(0, num_real_rows)
        for kind, tiling in zip(self.kinds, self._tilings, strict=True):
            nodes = []
            if share and self._share_prefixes and kind.window is None:
                nodes = find_shared_nodes(
                    rows.cu_seqlens_q[: num_real_rows + 1],
                    rows.slots[real],
                    rows.positions[: rows.cu_seqlens_q[num_real_rows]],
                    block_tables[kind.group],
                    self._block_size,
                )
            lists.append(
                plan_work(
                    rows.cu_seqlens_q,
                    rows.slots,
                    rows.positions,
                    num_q_heads=kind.num_q_heads,
                    num_kv_heads=kind.num_kv_heads,
                    tiling=tiling,
                    num_programs=self._num_programs,
                    window=kind.window,
                    nodes=nodes,
                )
            )
        return lists

    def graph_sizes(self, num_tokens: int, *, wide: bool, merged: bool) -> list[WorkSizes]:
        """Lengths of the lists in a graph of so many tokens, for each of `kinds`.

        They hold every step without shared keys, and such as have few levels of them.

        Args:
            wide: whether there are wide items; merged: whether there are tokens to merge.
        """
        sizes = []
        for kind in self.kinds:
            narrow_pieces, wide_pieces = (
                -(-number // kind.num_kv_heads) + 1 for number in self._num_programs
            )
            pieces = narrow_pieces + wide_pieces
            per_token = max(2, -(-2 * pieces // num_tokens))
            sizes.append(
                WorkSizes(
                    narrow=num_tokens + narrow_pieces + (num_tokens // 2 if merged else 0),
                    wide=(num_tokens // 2 + 8 + wide_pieces) if wide else 0,
                    num_entries=num_tokens * (4 if merged else 1),
                    merged=num_tokens if merged else 0,
                    total_partials=(PARTIALS_PER_TOKEN * num_tokens + 2 * pieces) * merged,
                    max_partials=per_token * 4 if merged else 0,
                )
            )
        return sizes

    def bind(
        self, arrays: Sequence[Sequence[torch.Tensor]], counts: Sequence[tuple[int, int]]
    ) -> list[DeviceWork]:
        """Work lists on the device.

        Args:
            arrays: for each of `kinds`, the arrays of LISTS.
            counts: for each, total_partials and max_partials.
        """
        return [
            DeviceWork(
                **dict(zip(LISTS, lists, strict=True)), total_partials=total, max_partials=most
            )
            for lists, (total, most) in zip(arrays, counts, strict=True)
        ]

    def run(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None],
        *,
        work: Sequence[DeviceWork],
        block_tables: Sequence[torch.Tensor],
        kv_slots: Sequence[torch.Tensor],
        position_ids: torch.Tensor,
        partials: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Write the step's k and v, then attend: [num_tokens, num_q_heads * head_dim].

        Args:
            q, k, v: as `attention.spec.Attend` has them.
            kv: keys and values of the layer, [num_blocks, num_kv_heads, block_size, head_dim] each,
                and scales of both if they are int8, fp32 without the last dimension.
            work: for each of `kinds`.
            block_tables, kv_slots: on the device, per KV group.
            position_ids: [num_tokens] int32, what to rotate by.
            partials: scratch for each of `kinds`; see `partials`.
        """
        which = self._kind_of_layer[spec.layer]
        kind = self.kinds[which]
        table = None if spec.rotary is None else self._tables[id(spec.rotary)]
        cos, sin = (None, None) if table is None else (table.cos, table.sin)
        interleaved = table is not None and table.interleaved
        keys, values, scales = kv
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        if not self.has_kernels:
            rotary_naive.rotary_kv_write(
                q, k, v, keys.transpose(2, 3), values, position_ids, kv_slots[kind.group],
                cos, sin, interleaved=interleaved, scales=scales,
            )  # fmt: skip
            work_naive.paged_attention(
                q, keys, values, block_tables[kind.group], work[which], scale=spec.scale,
                window=spec.window, soft_cap=spec.soft_cap, scales=scales, out=out, lse=lse,
            )  # fmt: skip
            return out.flatten(1)
        importlib.import_module("batchwright.kernels.rotary_kv_write.triton").rotary_kv_write(
            q, k, v, keys, values, position_ids, kv_slots[kind.group],
            cos, sin, interleaved=interleaved, scales=scales,
        )  # fmt: skip
        importlib.import_module("batchwright.kernels.paged_attention.triton").paged_attention(
            q, keys, values, block_tables[kind.group], work[which], tiling=self._tilings[which],
            scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap, scales=scales, out=out,
            lse=lse, partials=partials[which],
        )  # fmt: skip
        return out.flatten(1)

    def partials(
        self, counts: Sequence[tuple[int, int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Scratch of the kernel for work lists of these counts (see `bind`), one for all layers."""
        found = []
        for kind, (total, _) in zip(self.kinds, counts, strict=True):
            shape = total, kind.num_q_heads, kind.head_dim
            found.append(
                (
                    torch.empty(shape, dtype=torch.float32, device=self._device),
                    torch.empty(shape[:2], dtype=torch.float32, device=self._device),
                )
            )
        return found


def _interprets() -> bool:
    """Whether Triton runs its kernels on the CPU (TRITON_INTERPRET=1, in tests)."""
    try:
        knobs = importlib.import_module("triton").knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def _card(device: torch.device) -> tuple[int, tuple[int, int]]:
    """(ten times the compute capability, programs that fill it, narrow and wide)."""
    if device.type != "cuda":
        return 90, (0, 0)
    properties = torch.cuda.get_device_properties(device)
    narrow, wide = PROGRAMS_PER_MULTIPROCESSOR
    number = properties.multi_processor_count
    return 10 * properties.major + properties.minor, (narrow * number, wide * number)


def describe(work: WorkList) -> tuple[int, int]:
    """(total_partials, max_partials) of a work list."""
    return work.total_partials, work.max_partials
