"""Random paged attention problems whose unowned memory is NaN, and ways to run one in pieces."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from batchwright.kernels.paged_attention import naive
from batchwright.kernels.paged_attention.layout import cache_shapes
from batchwright.kernels.paged_attention.numba import paged_attention
from batchwright.kernels.paged_attention.plan import plan_attention

INVALID_BLOCK = 2**30  # reading it would be far out of bounds


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Heads and options of a layer."""

    num_q_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 32
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


@dataclass
class Case:
    """Sequences with all their keys and values; the last tokens of each are queries."""

    shape: Shape
    q: list[np.ndarray]  # per sequence [num_new, num_q_heads, head_dim]
    k: list[np.ndarray]  # per sequence [length, num_kv_heads, head_dim]
    v: list[np.ndarray]
    sinks: np.ndarray | None
    parents: dict[int, tuple[int, int]]


def make_case(
    shape: Shape,
    lengths: list[tuple[int, int]],
    seed: int = 0,
    parents: dict[int, tuple[int, int]] | None = None,
) -> Case:
    """Sequences of (keys already there, query tokens).

    parents[i] = (j, n): the first n keys and values of sequence i are those of sequence j < i.
    """
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    s = shape
    q = [2 * normal(new, s.num_q_heads, s.head_dim) for _, new in lengths]
    k = [normal(old + new, s.num_kv_heads, s.head_dim) for old, new in lengths]
    v = [normal(old + new, s.num_kv_heads, s.head_dim) for old, new in lengths]
    for i, (j, n) in (parents or {}).items():
        k[i][:n], v[i][:n] = k[j][:n], v[j][:n]
    return Case(shape, q, k, v, normal(s.num_q_heads) if s.sinks else None, parents or {})


@dataclass
class Paged:
    """The keys and values of a case laid out in blocks: shuffled, NaN wherever nothing is owned."""

    k_cache: np.ndarray
    v_cache: np.ndarray
    block_table: np.ndarray
    slots: np.ndarray


def page(case: Case, seed: int = 0, *, share: bool = False) -> Paged:
    """Put every sequence into blocks of its own, with ids drawn by `seed`.

    With `share`, whole blocks of keys that a sequence has from its parent are the parent's blocks.
    """
    rng = np.random.default_rng(seed)
    s = case.shape
    num_blocks = [-(-len(k) // s.block_size) for k in case.k]
    total = sum(num_blocks) + 3
    k_shape, v_shape = cache_shapes(total, s.num_kv_heads, s.head_dim, s.block_size)
    k_cache, v_cache = np.full(k_shape, np.nan, np.float32), np.full(v_shape, np.nan, np.float32)
    ids = iter(rng.permutation(total))
    num_slots = len(case.k) + 2
    table = np.full((num_slots, max(num_blocks) + 1), INVALID_BLOCK, np.int32)
    slots = rng.permutation(num_slots)[: len(case.k)].astype(np.int32)
    for i, (slot, k, v, q) in enumerate(zip(slots, case.k, case.v, case.q)):
        first_needed = 0 if s.window is None else max(0, len(k) - len(q) + 1 - s.window)
        first_own = first_needed // s.block_size
        if share and i in case.parents:
            parent, num_keys = case.parents[i]
            first_own = num_keys // s.block_size
            table[slot, :first_own] = table[slots[parent], :first_own]
        for b in range(first_own, -(-len(k) // s.block_size)):
            block = table[slot, b] = next(ids)
            part = slice(b * s.block_size, min((b + 1) * s.block_size, len(k)))
            used = part.stop - part.start
            k_cache[block, :, :, :used] = k[part].transpose(1, 2, 0)
            v_cache[block, :, :used, : s.head_dim] = v[part].transpose(1, 0, 2)
    return Paged(k_cache, v_cache, table, slots)


def run_step(
    case: Case, paged: Paged, rows: list[tuple[int, int, int]], **changes: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """One step of rows (sequence, first query, end query): (out, lse) per row.

    Queries are a strided view of a merged array, outputs are filled with NaN beforehand.
    """
    s = replace(case.shape, **changes)
    q = np.concatenate([case.q[i][a:b] for i, a, b in rows])
    merged = np.full(
        (len(q), (s.num_q_heads + 2 * s.num_kv_heads) * s.head_dim), np.nan, np.float32
    )
    view = merged[:, : s.num_q_heads * s.head_dim].reshape(q.shape)
    view[:] = q
    before = [len(case.k[i]) - len(case.q[i]) for i, _, _ in rows]
    positions = np.concatenate([np.arange(n + a, n + b) for n, (_, a, b) in zip(before, rows)])
    cu = np.cumsum([0] + [b - a for _, a, b in rows]).astype(np.int32)
    plan = plan_attention(
        cu,
        paged.slots[[i for i, _, _ in rows]],
        positions.astype(np.int32),
        num_q_heads=s.num_q_heads,
        num_kv_heads=s.num_kv_heads,
        window=s.window,
        block_table=paged.block_table,
        block_size=s.block_size,
    )
    out = np.full(q.shape, np.nan, np.float32)
    lse = np.full(q.shape[:2], np.nan, np.float32)
    paged_attention(
        view,
        paged.k_cache,
        paged.v_cache,
        paged.block_table,
        plan,
        scale=s.head_dim**-0.5,
        soft_cap=s.soft_cap,
        sinks=case.sinks,
        out=out,
        lse=lse,
    )
    return [(out[a:b], lse[a:b]) for a, b in itertools.pairwise(cu)]


def run_whole(case: Case, paged: Paged) -> list[tuple[np.ndarray, np.ndarray]]:
    """All queries of all sequences in one step."""
    return run_step(case, paged, [(i, 0, len(q)) for i, q in enumerate(case.q)])


def run_naive(case: Case, paged: Paged, **changes: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """The torch twin in fp64, all queries of all sequences."""
    s = replace(case.shape, **changes)
    lengths = [len(q) for q in case.q]
    positions = [np.arange(len(k) - len(q), len(k)) for k, q in zip(case.k, case.q)]
    cu = np.cumsum([0, *lengths]).astype(np.int32)
    out, lse = naive.paged_attention(
        torch.from_numpy(np.concatenate(case.q)).double(),
        torch.from_numpy(paged.k_cache),
        torch.from_numpy(paged.v_cache),
        torch.from_numpy(paged.block_table),
        torch.from_numpy(cu),
        torch.from_numpy(paged.slots),
        torch.from_numpy(np.concatenate(positions).astype(np.int32)),
        scale=s.head_dim**-0.5,
        window=s.window,
        soft_cap=s.soft_cap,
        sinks=None if case.sinks is None else torch.from_numpy(case.sinks),
    )
    return [(out[a:b].numpy(), lse[a:b].numpy()) for a, b in itertools.pairwise(cu)]
