"""Timed steps of paged attention in the shapes of Llama-3-8B, over one large pool of random KV.

A step's limits are its bytes over the measured copy bandwidth and its FLOPs over the measured
matrix rate. It must read its keys and values once (shared ones once for all), and do
4 * head_dim FLOPs per query head and visible key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batchwright.exec.device.kv_memory import EIGHT_BIT_DTYPES
from batchwright.kernels.paged_attention.shared_nodes import SharedNode
from batchwright.kernels.paged_attention.tiling import Tiling, choose_tiling
from batchwright.kernels.paged_attention.triton import paged_attention, to_device
from batchwright.kernels.paged_attention.work_list import PROGRAMS_PER_MULTIPROCESSOR, plan_work
from benchmarks.gpu.card import Call, Timer, architecture

CACHE_BYTES = 300 << 20
"""Copies of a small step take turns until they read this much: nothing is left in the L2 cache."""


@dataclass(frozen=True)
class Heads:
    """Sizes of one layer."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 64

    def kv_bytes(self, element_bytes: int) -> int:
        """Of one token."""
        return 2 * self.num_kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True)
class Work:
    """A step of rows that are alike: `num_new` queries each, after `context` keys of which the
    first `shared` are common to all rows."""

    num_rows: int
    context: int
    num_new: int = 1
    shared: int = 0

    @property
    def length(self) -> int:
        """Keys of a row."""
        return self.context + self.num_new

    @property
    def stored_tokens(self) -> int:
        """Keys of all rows, shared ones once."""
        return self.shared + self.num_rows * (self.length - self.shared)

    def flops(self, heads: Heads) -> int:
        """Of the products, of visible keys only."""
        pairs = self.num_new * self.context + self.num_new * (self.num_new + 1) // 2
        return 4 * heads.head_dim * heads.num_q_heads * self.num_rows * pairs


class Pool:
    """Random keys and values, and steps laid out in them."""

    def __init__(
        self,
        device: str,
        num_tokens: int,
        heads: Heads,
        dtype: torch.dtype,
        *,
        kv_cache_dtype: str = "auto",
    ) -> None:
        self.heads, self.device, self.dtype = heads, device, dtype
        self.kv_cache_dtype = kv_cache_dtype
        self.num_blocks = num_tokens // heads.block_size
        shape = (self.num_blocks, heads.num_kv_heads, heads.block_size, heads.head_dim)
        stored = EIGHT_BIT_DTYPES.get(kv_cache_dtype, dtype)
        self.k, self.v = (_random(shape, stored, device) for _ in "kv")
        self.scales: tuple[torch.Tensor, torch.Tensor] | None = None
        if stored == torch.int8:
            k_scales, v_scales = (torch.rand(shape[:3], device=device) / 64 for _ in "kv")
            self.scales = k_scales, v_scales
        self._rng = np.random.default_rng(0)

    def holds(self, work: Work) -> bool:
        """Does the step fit, each row's last block being its own?"""
        blocks = work.num_rows * (-(-(work.length - work.shared) // self.heads.block_size))
        return blocks + work.shared // self.heads.block_size <= self.num_blocks

    def num_copies(self, work: Work) -> int:
        """How many steps of this kind should take turns, and fit."""
        step_bytes = work.stored_tokens * self.heads.kv_bytes(self.k.element_size())
        fit = self.num_blocks * self.heads.block_size // (2 * work.stored_tokens + 1)
        return max(1, min(16, -(-CACHE_BYTES // step_bytes), fit))

    def block_tables(self, work: Work, copies: int) -> list[np.ndarray]:
        """[num_rows, blocks] int32 for each copy, of shuffled blocks, none in two copies."""
        size = self.heads.block_size
        shared, own = work.shared // size, -(-(work.length - work.shared) // size)
        assert work.shared % size == 0
        ids = self._rng.permutation(self.num_blocks).astype(np.int32)
        tables = []
        for _ in range(copies):
            table = np.empty((work.num_rows, shared + own), np.int32)
            table[:, :shared] = ids[:shared]
            table[:, shared:] = ids[shared : shared + work.num_rows * own].reshape(-1, own)
            ids = ids[shared + work.num_rows * own :]
            tables.append(table)
        return tables

    def paged_calls(
        self,
        work: Work,
        *,
        share: bool = True,
        tiling: Tiling | None = None,
        programs_per_multiprocessor: tuple[int, int] = PROGRAMS_PER_MULTIPROCESSOR,
    ) -> list[Call]:
        """Calls of our kernels that do the step, each over blocks of its own."""
        heads = self.heads
        if tiling is None:
            tiling = usual_tiling(
                heads, self.dtype.itemsize, self.device, kv_cache_dtype=self.kv_cache_dtype
            )
        num_rows, num_new = work.num_rows, work.num_new
        narrow, wide = programs_per_multiprocessor
        multiprocessors = _num_multiprocessors(self.device)
        nodes = [SharedNode(np.arange(num_rows), 0, work.shared)] if share and work.shared else []
        plan = plan_work(
            np.arange(0, num_rows * num_new + 1, num_new, dtype=np.int32),
            np.arange(num_rows, dtype=np.int32),
            np.tile(np.arange(work.context, work.length, dtype=np.int32), num_rows),
            num_q_heads=heads.num_q_heads,
            num_kv_heads=heads.num_kv_heads,
            tiling=tiling,
            num_programs=(narrow * multiprocessors, wide * multiprocessors),
            nodes=nodes,
        )
        on_device = to_device(plan, self.device)
        shape = (num_rows * num_new, heads.num_q_heads, heads.head_dim)
        q = torch.randn(shape, device=self.device, dtype=self.dtype)
        out, lse = torch.empty_like(q), torch.empty(shape[:2], device=self.device)
        partials = (
            torch.empty((plan.total_partials, *shape[1:]), device=self.device),
            torch.empty((plan.total_partials, shape[1]), device=self.device),
        )

        def call(table: torch.Tensor) -> Callable[[], None]:
            return lambda: paged_attention(
                q, self.k, self.v, table, on_device, tiling=tiling, scale=heads.head_dim**-0.5,
                out=out, lse=lse, partials=partials, scales=self.scales,
            )  # fmt: skip

        tables = self.block_tables(work, self.num_copies(work))
        return [call(torch.from_numpy(table).to(self.device)) for table in tables]

    def torch_calls(self, work: Work) -> list[Call]:
        """torch's scaled_dot_product_attention over contiguous keys, which paging never gives it.

        Decoding: the heads of a group are passed as queries of one kv head, so that it reads keys
        once for all of them. Empty if the rows do not fit.
        """
        heads, rows, length = self.heads, work.num_rows, work.length
        elements = rows * heads.num_kv_heads * length * heads.head_dim
        copies = min(self.num_copies(work), self.k.numel() // elements)
        shape = (rows, heads.num_kv_heads, length, heads.head_dim)
        group = heads.num_q_heads // heads.num_kv_heads
        decode = work.num_new == 1
        q_shape = (
            (rows, heads.num_kv_heads, group, heads.head_dim)
            if decode
            else (rows, heads.num_q_heads, work.num_new, heads.head_dim)
        )
        q = torch.randn(q_shape, device=self.device, dtype=self.k.dtype)
        options: dict[str, Any] = {} if decode else {"enable_gqa": True}
        if not decode and work.context == 0:
            options["is_causal"] = True
        elif not decode:
            from torch.nn.attention.bias import causal_lower_right

            options["attn_mask"] = causal_lower_right(work.num_new, length)

        def call(i: int) -> Callable[[], object]:
            part = slice(i * elements, (i + 1) * elements)
            k, v = self.k.view(-1)[part].view(shape), self.v.view(-1)[part].view(shape)
            return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

        return [call(i) for i in range(copies)]


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device)
    if dtype.itemsize == 1:  # torch draws no such numbers
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)
    return torch.randn(shape, device=device, dtype=dtype)


def measure(
    timer: Timer,
    pool: Pool,
    work: Work,
    limits: dict[str, float],
    calls: Sequence[Call],
    *,
    share: bool = True,
) -> dict[str, float]:
    """One line of results: time, and how much of the card that is.

    `share`: shared keys need to be read once; else once for each row.
    """
    seconds, spread = timer.seconds(calls)
    tokens = work.stored_tokens if share else work.num_rows * work.length
    heads, element_bytes = pool.heads, pool.k.element_size()
    queries = 2 * work.num_rows * work.num_new * heads.num_q_heads * heads.head_dim
    step_bytes = tokens * heads.kv_bytes(element_bytes) + queries * pool.dtype.itemsize
    bytes_s = step_bytes / limits["copy_bytes_per_s"]
    flops_s = work.flops(heads) / limits["matrix_flops_per_s"]
    return {
        "us": seconds * 1e6,
        "spread": spread,
        "gb_per_s": 1e-9 * step_bytes / seconds,
        "tflops": 1e-12 * work.flops(heads) / seconds,
        "share_of_copy_bandwidth": bytes_s / seconds,
        "share_of_matrix_rate": flops_s / seconds,
        "share_of_bound": max(bytes_s, flops_s) / seconds,
    }


def usual_tiling(
    heads: Heads, element_bytes: int, device: str, *, kv_cache_dtype: str = "auto"
) -> Tiling:
    """What the engine would take on this card."""
    return choose_tiling(
        heads.num_q_heads // heads.num_kv_heads,
        heads.head_dim,
        element_bytes,
        architecture=architecture(device),
        kv_cache_dtype=kv_cache_dtype,
    )


def _num_multiprocessors(device: str) -> int:
    if device == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
