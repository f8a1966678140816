"""The experts of a sparse feed-forward block on a GPU: one grouped product over all experts.

(Token, rank) pairs are sorted by expert, stably, by counting; nothing is read back to the host. A
program of the product takes one tile of rows of one expert and one tile of columns: it finds its
expert from the experts' starts, and there are as many programs as the worst split needs (those left
over end at once). One expert follows the other, and within one, programs that follow each other
share a tile of weights: so weights are read from memory once, and an expert's rows stay in the
cache. Rows are gathered from x as they are read, and scattered to their pairs as they are
written; a token's experts are then summed in the order of its ranks.

Rows and weights may be e4m3 with a scale for each row and each column (kernels/fp8_linear).

A token's sums are made in one order of its inputs in every tile shape, but the shape, which the
number of pairs decides and for an expert's last rows their number, may decide how tensor cores
round them: level *rounding*, and reproducible.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from batchwright.errors import ShapeError
from batchwright.kernels.fp8_linear.triton import quantize_rows
from batchwright.kernels.gated_activation.triton import gated_activation


class ProductTile(NamedTuple):
    """One configuration of the product: rows x columns x depth, and Triton's warps and stages."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def choose_tile(
    num_pairs: int, num_experts: int, element_bytes: int, *, architecture: int = 90
) -> ProductTile:
    """A tile for that many rows of all experts together.

    fp32 products run on plain cores, in small tiles; few rows an expert are bound by the bandwidth
    of the weights, many by the tensor cores.

    Args:
        element_bytes: of rows and weights: 4, 2, or 1 (e4m3).
        architecture: ten times the compute capability, such as 80, 89 or 90.
    """
    rows = num_pairs / num_experts
    if element_bytes == 4:
        return ProductTile(16, 32, 32, 4, 2) if rows <= 16 else ProductTile(32, 32, 32, 4, 2)
    # Measured on an H200 (benchmarks/results/2026-11-27-gpu-h200-moe.json); the last one fills the
    # shared memory that only sm_90 has twice over, and was tried there alone.
    width = 2 // element_bytes  # e4m3 has twice the depth in as many bytes
    if rows <= 8:
        return ProductTile(16, 64, 128 * width, 4, 4)
    if rows <= 32:
        return ProductTile(64, 128, 64 * width, 4, 4)
    if rows <= 64 or architecture // 10 != 9:
        return ProductTile(128, 128, 64 * width, 8, 3)
    return ProductTile(128, 256, 64 * width, 8, 3)


class ExpertRows(NamedTuple):
    """The pairs of a step by expert, on the device.

    Attributes:
        pairs: [num_tokens * top_k] int32, token * top_k + rank, by expert and then ascending.
        starts: [num_experts + 1] int32: expert e has pairs[starts[e] : starts[e + 1]].
    """

    pairs: torch.Tensor
    starts: torch.Tensor


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> ExpertRows:
    """Sort (token, rank) pairs by expert.

    Args:
        experts: [num_tokens, top_k] int32 or int64 of [0, num_experts), contiguous.
        num_experts: at most 1024.
    """
    num_pairs = experts.numel()
    if not experts.is_contiguous() or experts.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"sort_by_expert: experts are {experts.dtype}, or not contiguous")
    if not 0 < num_experts <= 1024:
        raise ShapeError(f"sort_by_expert: {num_experts} experts; the limits are 1 and 1024")
    rows = ExpertRows(
        torch.empty(num_pairs, dtype=torch.int32, device=experts.device),
        torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device),
    )
    block = min(1024, triton.next_power_of_2(max(num_pairs, 16)))
    _sort[(num_experts,)](experts, *rows, num_pairs, BLOCK=block, num_warps=4)
    return rows


def expert_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: ExpertRows,
    out: torch.Tensor,
    *,
    top_k: int = 0,
    to_pairs: bool = False,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    tile: ProductTile | None = None,
) -> None:
    """Every row times the transpose of its expert's weight.

    Args:
        x: [num_pairs, in_features] by expert, or with top_k > 0 [num_tokens, in_features]: the row
            of a pair is then pair // top_k. fp32, fp16, bf16 or e4m3fn; rows may be strided.
        weight: [num_experts, out_features, in_features], x's dtype, contiguous.
        rows: from sort_by_expert.
        out: [num_pairs, out_features], contiguous, written: by expert, or with to_pairs in the
            order of the pairs. x's dtype, or another one if that is e4m3fn.
        scales: with e4m3fn, and only then: fp32, contiguous, of x's rows, and of the columns,
            [num_experts, out_features].
        tile: None: chosen.
    Raises:
        ShapeError: shapes or dtypes disagree.

    Sums are fp32 (fp32 products are exact fp32, no tf32) and rounded once; of e4m3 they have the 14
    bits of Hopper's tensor cores.
    """
    num_experts, out_features, in_features = weight.shape
    num_pairs = len(rows.pairs)
    if (
        len(rows.starts) != num_experts + 1
        or x.shape != (num_pairs // max(top_k, 1), in_features)
        or out.shape != (num_pairs, out_features)
        or x.dtype != weight.dtype
        or (scales is not None) != (x.dtype == torch.float8_e4m3fn)
        or (scales is None and out.dtype != x.dtype)
        or (
            scales is not None
            and (scales[0].numel() != len(x) or scales[1].shape != weight.shape[:2])
        )
    ):
        raise ShapeError(
            f"expert_product: x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} "
            f"{weight.dtype}, out {tuple(out.shape)} {out.dtype}, {num_pairs} pairs of "
            f"{len(rows.starts) - 1} experts and top_k {top_k} disagree"
        )
    if x.stride(1) != 1 or not weight.is_contiguous() or not out.is_contiguous():
        raise ShapeError("expert_product: rows of x, weight and out must be contiguous")
    if num_pairs == 0:
        return
    tile = tile or choose_tile(
        num_pairs, num_experts, x.element_size(), architecture=_architecture(x.device)
    )
    # an expert may end within a tile: one more for each that has any
    num_tiles = triton.cdiv(num_pairs, tile.rows) + min(num_experts, num_pairs)
    _product[(num_tiles * triton.cdiv(out_features, tile.columns),)](
        x, weight, *(scales or (None, None)), rows.pairs, rows.starts, out, x.stride(0),
        NUM_EXPERTS=num_experts, BLOCK_E=triton.next_power_of_2(num_experts), TOP_K=top_k,
        TO_PAIRS=to_pairs, COLUMNS=out_features, DEPTH=in_features, ROWS=tile.rows,
        BLOCK_N=tile.columns, BLOCK_K=tile.depth, SCALED=scales is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@functools.cache
def _architecture(device: torch.device) -> int:
    """Ten times the compute capability; of an H100 in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def sum_ranks(outputs: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Weighted sum over a token's experts, in the order of its ranks.

    Args:
        outputs: [num_tokens, top_k, hidden_size], contiguous.
        weights: [num_tokens, top_k] fp32, contiguous.
        out: [num_tokens, hidden_size], outputs' dtype, contiguous, written; summed in fp32.
    """
    num_tokens, top_k, size = outputs.shape
    if weights.shape != (num_tokens, top_k) or out.shape != (num_tokens, size):
        raise ShapeError(
            f"sum_ranks: outputs {tuple(outputs.shape)}, weights {tuple(weights.shape)} and out "
            f"{tuple(out.shape)} disagree"
        )
    if not (outputs.is_contiguous() and weights.is_contiguous() and out.is_contiguous()):
        raise ShapeError("sum_ranks: outputs, weights and out must be contiguous")
    if num_tokens == 0:
        return
    block = min(1024, triton.next_power_of_2(size))
    _sum_ranks[(num_tokens, triton.cdiv(size, block))](
        outputs, weights, out, TOP_K=top_k, SIZE=size, BLOCK=block, num_warps=4,
        enable_fp_fusion=False,  # products are rounded before they are added, as in the twin
    )  # fmt: skip


def expert_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    kind: str = "silu",
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The experts of a sparse feed-forward block, for every token of a step.

    Args:
        x: [num_tokens, hidden_size] fp32, fp16 or bf16.
        experts: [num_tokens, top_k] int32 or int64, most probable first (models/moe.route).
        weights: [num_tokens, top_k] fp32.
        gate_up: [num_experts, 2 * width, hidden_size], x's dtype or e4m3fn: gate rows, then up
            rows.
        down: [num_experts, hidden_size, width].
        kind: as in gated_activation.
        scales: with e4m3fn weights, and only then: fp32, [num_experts, 2 * width] and
            [num_experts, hidden_size]. Both products then take rows in e4m3fn, lossy.
    Returns:
        [num_tokens, hidden_size], x's dtype.
    """
    num_tokens, top_k = experts.shape
    rows = sort_by_expert(experts, len(gate_up))
    both = x.new_empty(num_tokens * top_k, gate_up.shape[1])
    inner = x.new_empty(num_tokens * top_k, gate_up.shape[1] // 2)
    outputs = x.new_empty(num_tokens * top_k, x.shape[1])
    if scales is None:
        expert_product(x, gate_up, rows, both, top_k=top_k)
        gated_activation(both, kind, inner)
        expert_product(inner, down, rows, outputs, to_pairs=True)
    else:
        x8, x_scales = quantize_rows(x)
        expert_product(x8, gate_up, rows, both, top_k=top_k, scales=(x_scales, scales[0]))
        gated_activation(both, kind, inner)
        inner8, inner_scales = quantize_rows(inner)
        expert_product(inner8, down, rows, outputs, to_pairs=True, scales=(inner_scales, scales[1]))
    out = torch.empty_like(x)
    sum_ranks(outputs.unflatten(0, (num_tokens, top_k)), weights, out)
    return out


@triton.jit(do_not_specialize=["num_pairs"])
def _sort(
    experts: tl.tensor,
    pairs: tl.tensor,
    starts: tl.tensor,
    num_pairs: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One expert: where it begins, and its pairs in ascending order."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < num_pairs:
        there = start + lane < num_pairs
        of = tl.load(experts + start + lane, mask=there, other=2147483647)
        before += (of < expert).to(tl.int32)
        start += BLOCK
    place = tl.sum(before, 0)
    tl.store(starts + expert, place)
    start = 0
    while start < num_pairs:
        there = start + lane < num_pairs
        mine = tl.load(experts + start + lane, mask=there, other=2147483647) == expert
        at = place + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(pairs + at, start + lane, mask=mine)
        place += tl.sum(mine.to(tl.int32), 0)
        start += BLOCK
    tl.store(starts + expert + 1, place, mask=expert == tl.num_programs(0) - 1)


@triton.jit
def _product(
    x: tl.tensor,
    weight: tl.tensor,
    x_scales: tl.tensor,
    w_scales: tl.tensor,
    pairs: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    TO_PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    # the expert of this program: those of all experts follow each other
    e = tl.arange(0, BLOCK_E)
    begins = tl.load(starts + e, mask=e < NUM_EXPERTS, other=0)
    ends = tl.load(starts + e + 1, mask=e < NUM_EXPERTS, other=0)
    tiles = (ends - begins + ROWS - 1) // ROWS
    programs = tiles * ((COLUMNS + BLOCK_N - 1) // BLOCK_N)
    expert = tl.sum((tl.cumsum(programs, 0) <= tl.program_id(0)).to(tl.int32), 0)
    if expert >= NUM_EXPERTS:
        return
    place = tl.program_id(0) - tl.sum(tl.where(e < expert, programs, 0), 0)
    own_tiles = tl.sum(tl.where(e == expert, tiles, 0), 0)
    column = place // own_tiles * BLOCK_N
    row = tl.sum(tl.where(e == expert, begins, 0), 0) + place % own_tiles * ROWS
    end = tl.sum(tl.where(e == expert, ends, 0), 0)
    # half a tile of wgmma (64 rows) takes little more than half the time of a whole one
    if ROWS >= 128 and end - row <= ROWS // 2:
        _multiply(
            x, weight, x_scales, w_scales, pairs, out, x_stride, expert, row, end, column,
            TOP_K, TO_PAIRS, COLUMNS, DEPTH, ROWS // 2, BLOCK_N, BLOCK_K, SCALED,
        )  # fmt: skip
    else:
        _multiply(
            x, weight, x_scales, w_scales, pairs, out, x_stride, expert, row, end, column,
            TOP_K, TO_PAIRS, COLUMNS, DEPTH, ROWS, BLOCK_N, BLOCK_K, SCALED,
        )  # fmt: skip


@triton.jit
def _multiply(
    x: tl.tensor,
    weight: tl.tensor,
    x_scales: tl.tensor,
    w_scales: tl.tensor,
    pairs: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    expert: tl.tensor,
    first_row: tl.tensor,
    end: tl.tensor,
    first_column: tl.tensor,
    TOP_K: tl.constexpr,
    TO_PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """One tile: pairs [first_row, first_row + ROWS), before end, of an expert."""
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, BLOCK_N)
    live = row < end
    pair = tl.load(pairs + row, mask=live, other=0)
    if TOP_K > 0:
        source = (pair // TOP_K).to(tl.int64)
    else:
        source = row.to(tl.int64)

    depth = tl.arange(0, BLOCK_K)
    x_rows = x + (source * x_stride)[:, None]
    w_rows = weight + expert.to(tl.int64) * (COLUMNS * DEPTH) + (column * DEPTH)[:, None]
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        at = k + depth
        if DEPTH % BLOCK_K == 0:
            a = tl.load(x_rows + at[None, :], mask=live[:, None], other=0.0)
            b = tl.load(w_rows + at[None, :], mask=(column < COLUMNS)[:, None], other=0.0)
        else:
            inside = (at < DEPTH)[None, :]
            a = tl.load(x_rows + at[None, :], mask=live[:, None] & inside, other=0.0)
            b = tl.load(w_rows + at[None, :], mask=(column < COLUMNS)[:, None] & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if SCALED:
        row_scales = tl.load(x_scales + source, mask=live, other=0.0)
        scale_of = w_scales + expert * COLUMNS + column
        acc *= row_scales[:, None] * tl.load(scale_of, mask=column < COLUMNS, other=0.0)[None, :]
    if TO_PAIRS:
        target = pair.to(tl.int64)
    else:
        target = row.to(tl.int64)
    held = live[:, None] & (column < COLUMNS)[None, :]
    place = out + (target * COLUMNS)[:, None] + column[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=held)


@triton.jit
def _sum_ranks(
    outputs: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for rank in range(TOP_K):
        share = tl.load(weights + token * TOP_K + rank)
        values = tl.load(outputs + (token * TOP_K + rank) * SIZE + column, mask=held, other=0.0)
        total += values.to(tl.float32) * share
    tl.store(out + token * SIZE + column, total.to(out.dtype.element_ty), mask=held)
