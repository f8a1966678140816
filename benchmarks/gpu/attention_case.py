"""Random paged attention problems for the GPU kernel, whose unowned memory is NaN, and its twin."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from batchwright.kernels.paged_attention import naive
from batchwright.kernels.paged_attention.shared_nodes import SharedNode, find_shared_nodes
from batchwright.kernels.paged_attention.tiling import Tiling, choose_tiling
from batchwright.kernels.paged_attention.triton import paged_attention, to_device
from batchwright.kernels.paged_attention.work_list import WorkList, plan_work
from batchwright.kernels.rotary_kv_write.naive import stored
from benchmarks.gpu.card import architecture

INVALID_BLOCK = 2**30  # reading it would be far out of bounds


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """A step of rows (keys already there, query tokens) and how it is cut.

    Attributes:
        parents: row i begins with the first n keys of row j: {i: (j, n)}, in the same blocks.
        num_programs: as in plan_work.
        cache: "" (queries' dtype), "fp8" or "int8".
    """

    name: str
    rows: tuple[tuple[int, int], ...]
    num_q_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 32
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    parents: dict[int, tuple[int, int]] = field(default_factory=dict)
    min_shared_keys: int = 128
    num_programs: tuple[int, int] = (0, 0)
    cache: str = ""


@dataclass(eq=False)
class AttentionProblem:
    """A case made of numbers of one dtype on one device."""

    case: AttentionCase
    q: torch.Tensor  # [num_tokens, num_q_heads, head_dim], a view of a merged tensor
    k_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, head_dim], as is v_cache
    v_cache: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None  # of int8 keys and values
    block_table: torch.Tensor  # [max_slots, max_blocks] int32
    sinks: torch.Tensor | None
    cu_seqlens_q: np.ndarray
    row_slots: np.ndarray
    positions: np.ndarray

    def plan(self, nodes: list[SharedNode] | None = None) -> tuple[WorkList, Tiling]:
        """Work list and tiling; nodes None: found in the block table."""
        case = self.case
        if nodes is None and case.window is None:
            nodes = find_shared_nodes(
                self.cu_seqlens_q,
                self.row_slots,
                self.positions,
                self.block_table.cpu().numpy(),
                case.block_size,
                min_keys=case.min_shared_keys,
            )
        group_size = case.num_q_heads // case.num_kv_heads
        tiling = choose_tiling(
            group_size,
            case.head_dim,
            self.q.element_size(),
            architecture=architecture(self.q.device.type),
            kv_cache_dtype=self.case.cache or "auto",
        )
        work = plan_work(
            self.cu_seqlens_q,
            self.row_slots,
            self.positions,
            num_q_heads=case.num_q_heads,
            num_kv_heads=case.num_kv_heads,
            tiling=tiling,
            num_programs=case.num_programs,
            window=case.window,
            nodes=nodes or (),
        )
        return work, tiling

    def run(self, plan: tuple[WorkList, Tiling] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) by the kernel; both, and its scratch memory, are NaN beforehand."""
        work, tiling = self.plan() if plan is None else plan
        device, heads = self.q.device, self.q.shape[1]
        out = torch.full(self.q.shape, torch.nan, dtype=self.q.dtype, device=device)
        lse = torch.full(self.q.shape[:2], torch.nan, device=device)
        partial_shape = (work.total_partials, heads, self.q.shape[2])
        paged_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_table,
            to_device(work, device),
            tiling=tiling,
            scale=self.case.head_dim**-0.5,
            window=self.case.window,
            soft_cap=self.case.soft_cap,
            sinks=self.sinks,
            out=out,
            lse=lse,
            partials=(
                torch.full(partial_shape, torch.nan, device=device),
                torch.full(partial_shape[:2], torch.nan, device=device),
            ),
            scales=self.scales,
        )
        return out, lse

    def some_tokens(self) -> np.ndarray:
        """Tokens worth the twin's time: the ends of every row and one in seven of the others."""
        ends = np.concatenate([self.cu_seqlens_q[:-1], self.cu_seqlens_q[1:] - 1])
        return np.unique(np.concatenate([ends, np.arange(0, len(self.positions), 7)]))

    def run_twin(self, tokens: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) by the twin in fp64 on the CPU, from the same rounded numbers.

        `tokens`: only of these query tokens; None: of all.
        """
        if tokens is None:
            tokens = np.arange(len(self.positions))
        k_cache, v_cache = self.k_cache.cpu().double(), self.v_cache.cpu().double()
        if self.scales is not None:
            k_cache *= self.scales[0].cpu()[..., None]
            v_cache *= self.scales[1].cpu()[..., None]
        row_of_token = np.repeat(np.arange(len(self.row_slots)), np.diff(self.cu_seqlens_q))
        return naive.paged_attention(
            self.q.cpu().double()[tokens],
            k_cache.transpose(2, 3),
            v_cache,
            self.block_table.cpu(),
            torch.arange(len(tokens) + 1),  # every token as a row of its own
            torch.from_numpy(self.row_slots[row_of_token[tokens]]),
            torch.from_numpy(self.positions[tokens]),
            scale=self.case.head_dim**-0.5,
            window=self.case.window,
            soft_cap=self.case.soft_cap,
            sinks=None if self.sinks is None else self.sinks.cpu(),
        )


def make_problem(
    case: AttentionCase, dtype: torch.dtype, device: str, seed: int = 0
) -> AttentionProblem:
    """Draw a case: shuffled blocks, NaN in every slot that holds no key."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = [old + new for old, new in case.rows]
    num_blocks = [-(-length // case.block_size) for length in lengths]
    total = sum(num_blocks) + 3
    ids = iter(rng.permutation(total))
    num_slots = len(case.rows) + 2
    table = np.full((num_slots, max(num_blocks) + 1), INVALID_BLOCK, np.int32)
    slots = rng.permutation(num_slots)[: len(case.rows)].astype(np.int32)
    cache_shape = (total, case.num_kv_heads, case.block_size, case.head_dim)
    k_cache, v_cache = (torch.full(cache_shape, torch.nan, dtype=dtype) for _ in range(2))
    for i, (slot, (old, _), length) in enumerate(zip(slots, case.rows, lengths, strict=True)):
        first = 0 if case.window is None else max(0, old + 1 - case.window) // case.block_size
        if i in case.parents:
            parent, num_keys = case.parents[i]
            assert num_keys % case.block_size == 0 and case.window is None
            first = num_keys // case.block_size
            table[slot, :first] = table[slots[parent], :first]
        for block in range(first, -(-length // case.block_size)):
            table[slot, block] = next(ids)
        keys = torch.arange(first * case.block_size, length)
        blocks = torch.from_numpy(table[slot])[keys // case.block_size].long()
        for cache in (k_cache, v_cache):
            shape = (len(keys), case.num_kv_heads, case.head_dim)
            cache[blocks, :, keys % case.block_size] = torch.randn(shape, generator=generator).to(
                dtype
            )
    scales = None
    if case.cache:
        kept = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[case.cache]
        k_cache, k_scales = stored(k_cache.float(), kept)
        v_cache, v_scales = stored(v_cache.float(), kept)
        if k_scales is not None and v_scales is not None:
            scales = (k_scales.to(device), v_scales.to(device))
    counts = [new for _, new in case.rows]
    merged_heads = case.num_q_heads + 2 * case.num_kv_heads
    merged = torch.full((sum(counts), merged_heads * case.head_dim), torch.nan, dtype=dtype)
    shape = (sum(counts), case.num_q_heads, case.head_dim)
    merged[:, : case.num_q_heads * case.head_dim] = (
        (2 * torch.randn(shape, generator=generator)).to(dtype).flatten(1)
    )
    merged = merged.to(device)
    q = merged[:, : case.num_q_heads * case.head_dim].unflatten(1, shape[1:])
    sinks = torch.randn(case.num_q_heads, generator=generator).to(device) if case.sinks else None
    return AttentionProblem(
        case,
        q,
        k_cache.to(device),
        v_cache.to(device),
        scales,
        torch.from_numpy(table).to(device),
        sinks,
        np.cumsum([0, *counts]).astype(np.int32),
        slots,
        np.concatenate([np.arange(old, old + new) for old, new in case.rows]).astype(np.int32),
    )


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest over tokens and heads of |found - right| / |right| in the L2 norm; NaN if any is."""
    found, right = found.cpu().double(), right.double()
    size = torch.linalg.vector_norm(right, dim=-1).clamp_min(1e-30)
    error = torch.linalg.vector_norm(found - right, dim=-1) / size
    return float(error.max()) if error.numel() else 0.0


def largest_difference(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest |found - right|, where equal infinities do not differ; NaN if any is."""
    found, right = found.cpu().double(), right.double()
    difference = torch.where(found == right, 0.0, (found - right).abs())
    return float(difference.max()) if difference.numel() else 0.0
