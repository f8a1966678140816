"""Shared-prefix attention by matrix products: the rival of benchmarks/shared_prefix.py.

Hydragen (arXiv:2402.05099) in its hierarchical form, with groups of any sizes: keys of a node of
the tree of block tables are attended once for the stacked queries of its rows by products of the
BLAS, all other keys by the paged kernel, and the parts are merged by their log-sum-exp. Every query
token of a node comes after all its keys, so no mask is needed.

Level rounding: a product's bits depend on how many rows share the node. The paged kernel, which
shares loads only, keeps level bits, and was faster wherever we looked (docs/experiments.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange

from batchwright.kernels.paged_attention.plan import AttentionPlan, plan_attention, sort_rows
from batchwright.kernels.simd import (
    LANES,
    add,
    constant,
    horizontal_max,
    horizontal_sum,
    load,
    maximum,
    mul,
    splat,
    store,
    sub,
)
from batchwright.kernels.simd_math import exp2, tanh
from batchwright.request import Int32Array

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
F32 = np.float32
SCORES_AT_ONCE = 2**17
"""Half a MiB of fp32: they stay in a core's cache between the two products."""


class Node(NamedTuple):
    """Keys that are attended once for several query tokens.

    Attributes:
        tokens: [num] int32, the query tokens.
        slot: a line of the block table that holds these keys; all users' lines do.
        start, end: positions [start, end) of the keys, multiples of the tile of 128.
    """

    tokens: Int32Array
    slot: int
    start: int
    end: int


def find_nodes(
    row_slots: Int32Array,
    positions: Int32Array,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    block_table: Int32Array,
    block_size: int,
    min_rows: int,
) -> tuple[list[Node], AttentionPlan]:
    """Nodes of a step of one token per row that `min_rows` rows share, and the plan of the rest.

    Args: as in `plan_attention`, without a window.
    """
    num_rows = len(row_slots)
    cu_seqlens_q = np.arange(num_rows + 1, dtype=np.int32)
    rest = plan_attention(
        cu_seqlens_q,
        row_slots,
        positions,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        block_table=block_table,
        block_size=block_size,
    )
    order, shared = sort_rows(cu_seqlens_q, row_slots, positions, block_table, block_size)
    nodes, starts = [], np.zeros(num_rows, np.int32)
    stack = [(0, num_rows, 0)]
    while stack:  # ranges of rows whose keys from `start` on are open
        first, end, start = stack.pop()
        if end - first < max(2, min_rows):
            starts[order[first:end]] = start
            continue
        common = int(shared[first : end - 1].min())
        if common > start:
            rows = order[first:end].astype(np.int32)
            nodes.append(Node(rows, int(row_slots[rows[0]]), start, common))
        cuts = [first, *(np.flatnonzero(shared[first : end - 1] == common) + first + 1), end]
        stack += [(a, b, common) for a, b in itertools.pairwise(cuts)]
    return nodes, rest._replace(key_start=starts[rest.tokens])


def add_nodes(
    q: torch.Tensor,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    nodes: Iterable[Node],
    *,
    scale: float,
    soft_cap: float | None = None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merge attention over the nodes' keys into attention over the other keys.

    Args:
        q: [num_tokens, num_q_heads, head_dim] fp32, rotated.
        k_cache, v_cache, block_table: numpy arrays, as in paged attention.
        nodes: from `find_nodes`.
        scale, soft_cap: as in paged attention.
        out: [num_tokens, num_q_heads, head_dim] fp32, already normalised; merged into.
        lse: [num_tokens, num_q_heads] fp32, natural log; merged into. A query without other keys
            has lse = -inf, and its out is ignored.
    """
    num_q_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[3]
    group = num_q_heads // num_kv_heads
    factor = scale * LOG2_E if soft_cap is None else scale / soft_cap
    for node in nodes:
        ids = block_table[node.slot, node.start // block_size : -(-node.end // block_size)]
        num_keys, skip = node.end - node.start, node.start % block_size
        keys = torch.empty(num_kv_heads, head_dim, num_keys)
        values = torch.empty(num_kv_heads, num_keys, head_dim)
        _gather(k_cache, v_cache, ids, skip, keys.numpy(), values.numpy())
        tokens = torch.from_numpy(node.tokens).long()
        stacked = (q[tokens] * factor).unflatten(1, (num_kv_heads, group)).transpose(0, 1)
        queries = stacked.reshape(num_kv_heads, -1, head_dim)  # [num_kv_heads, rows, head_dim]
        parts = torch.empty_like(queries)
        part_lse, totals = torch.empty(2, *queries.shape[:2])
        chunk = max(8, SCORES_AT_ONCE // num_keys)
        for head in range(num_kv_heads):
            for first in range(0, queries.shape[1], chunk):
                rows = slice(first, first + chunk)
                scores = queries[head, rows] @ keys[head]
                at = (head, rows)
                _weigh(scores.numpy(), soft_cap or 0.0, part_lse[at].numpy(), totals[at].numpy())
                torch.mm(scores, values[head], out=parts[head, rows])
        arrays = (x.numpy() for x in (parts, part_lse, totals))
        _merge(*arrays, node.tokens, group, out.numpy(), lse.numpy())


@njit(cache=True, parallel=True, error_model="numpy")
def _gather(k_cache: Any, v_cache: Any, block_ids: Any, skip: int, keys: Any, values: Any) -> None:
    """keys [heads, dim, num_keys] and values [heads, num_keys, dim] of blocks, from key `skip`."""
    num_heads, dim, num_keys = keys.shape
    block_size = k_cache.shape[3]
    for task in prange(num_heads * len(block_ids)):
        head, index = task // len(block_ids), task % len(block_ids)
        block = np.int64(block_ids[index])
        begin = index * block_size - skip
        first, end = max(0, begin), min(num_keys, begin + block_size)
        for d in range(dim):
            for key in range(first, end):
                keys[head, d, key] = k_cache[block, head, d, key - begin]
        for key in range(first, end):
            for d in range(dim):
                values[head, key, d] = v_cache[block, head, key - begin, d]


@njit(cache=True, parallel=True, error_model="numpy")
def _weigh(scores: Any, soft_cap: float, lse: Any, totals: Any) -> None:
    """Scores [rows, num_keys], log2 units (or the cap's), to weights, their sum and the lse."""
    num_rows, num_keys = scores.shape  # keys are whole tiles of 128
    flat = scores.reshape(num_rows * num_keys)
    for row in prange(num_rows):
        begin, end = row * num_keys, (row + 1) * num_keys
        if soft_cap != 0.0:
            for i in range(begin, end, LANES):
                capped = mul(splat(F32(soft_cap * LOG2_E)), tanh(load(flat, i)))
                store(flat, i, capped)
        a = b = load(flat, begin)
        for i in range(begin, end, 2 * LANES):
            a, b = maximum(load(flat, i), a), maximum(load(flat, i + LANES), b)
        largest = horizontal_max(maximum(a, b))
        top = splat(largest)
        x = y = constant(0.0)
        for i in range(begin, end, 2 * LANES):
            v, w = exp2(sub(load(flat, i), top)), exp2(sub(load(flat, i + LANES), top))
            store(flat, i, v)
            store(flat, i + LANES, w)
            x, y = add(x, v), add(y, w)
        total = horizontal_sum(add(x, y))
        totals[row] = total
        lse[row] = largest * LN_2 + math.log(np.float64(total))


@njit(cache=True, parallel=True, error_model="numpy")
def _merge(
    parts: Any, part_lse: Any, totals: Any, tokens: Any, group: int, out: Any, lse: Any
) -> None:
    """Add parts [kv heads, tokens * group, dim], weighted by `totals` in all, to out and lse."""
    for i in prange(len(tokens)):
        token = np.int64(tokens[i])
        for head in range(out.shape[1]):
            kv_head, row = head // group, i * group + head % group
            old, new = lse[token, head], part_lse[kv_head, row]
            top = max(old, new)
            keep, take = math.exp(old - top), math.exp(new - top)
            lse[token, head] = top + math.log(keep + take)
            keep, take = F32(keep / (keep + take)), F32(take / (keep + take) / totals[kv_head, row])
            for d in range(out.shape[2]):
                before = out[token, head, d] * keep if keep != 0.0 else F32(0.0)
                out[token, head, d] = before + parts[kv_head, row, d] * take
