"""The layout in which weights are kept for products on CPU: panels of 32 output columns.

A panel holds, for each input feature, the weights of 32 outputs side by side: one vector load gives
what 32 chains of multiply-adds need next, and a panel is read from beginning to end. Values stay as
narrow as the checkpoint has them. Packed weights take the place of a checkpoint's, there is no
second copy.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numba import njit, types

from batchwright.kernels import get_num_threads
from batchwright.kernels.arguments import argument_reader
from batchwright.kernels.parallel import Task, compile_task, run_tasks

PANEL = 32

BLANK_BLOCK = 32
"""Inputs that share a scale in most formats."""

NO_SCALES = torch.empty(0, 0, 2, PANEL)


class PackedWeight(NamedTuple):
    """A weight [out_features, in_features] laid out in panels; zeros beyond out_features.

    Attributes:
        values: [ceil(out_features / 32), in_features, 32] fp32, fp16, uint16 (the bits of bf16) or
            int8; of 4-bit integers [.., .., 16] uint8, a byte for a column of the first half in its
            low bits and one of the second half.
        scales: of integers [num_panels, num_blocks, 2, 32] fp32: in a block of inputs, a weight is
            integer * scales[.., 0, ..] + scales[.., 1, ..]. Otherwise empty.
    """

    values: torch.Tensor
    scales: torch.Tensor = NO_SCALES

    @property
    def nbytes(self) -> int:
        """Of values and scales."""
        return self.values.nbytes + self.scales.nbytes


def pack(weight: torch.Tensor) -> PackedWeight:
    """Lay out a weight [out_features, in_features] of fp32, bf16 or fp16 on the CPU."""
    if weight.dtype == torch.float32:
        return PackedWeight(_panels(weight))
    bits = _panels(weight.view(torch.uint16))
    return PackedWeight(bits if weight.dtype == torch.bfloat16 else bits.view(weight.dtype))


def pack_blocks(
    integers: torch.Tensor, steps: torch.Tensor, lowest: torch.Tensor | None, bits: int
) -> PackedWeight:
    """Lay out a weight of integers with scales.

    Args:
        integers: [out_features, in_features] int8, from 0 to 15 if they are of 4 bits.
        steps, lowest: [out_features, num_blocks] fp32; a weight is integer * step + lowest, where
            the product is exact in fp32 or nothing is added.
        bits: 4 or 8.
    """
    values = _panels(integers.view(torch.uint8))
    if bits == 4:
        values = values[..., : PANEL // 2] | values[..., PANEL // 2 :] << 4
    else:
        values = values.view(torch.int8)
    if lowest is None:
        lowest = torch.zeros_like(steps)
    rows = F.pad(torch.stack((steps, lowest), dim=-1), (0, 0, 0, 0, 0, -len(steps) % PANEL))
    scales = rows.unflatten(0, (-1, PANEL)).permute(0, 2, 3, 1)
    return PackedWeight(values.contiguous(), scales.contiguous())


def blank(out_features: int, in_features: int, form: str) -> PackedWeight:
    """A weight that means nothing, for measuring time.

    Args:
        form: "fp32", "bf16", "fp16", "int8" or "int4"; integers need whole blocks of inputs, other
            weights are fp32.
    """
    if form.startswith("int") and in_features % BLANK_BLOCK:
        form = "fp32"
    shape = (-(-out_features // PANEL), in_features, PANEL // 2 if form == "int4" else PANEL)
    if not form.startswith("int"):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[form]
        values = torch.full(shape, 0.01, dtype=dtype)
        return PackedWeight(values.view(torch.uint16) if form == "bf16" else values)
    values = torch.ones(shape, dtype=torch.uint8 if form == "int4" else torch.int8)
    scales = torch.full((shape[0], in_features // BLANK_BLOCK, 2, PANEL), 0.01)
    return PackedWeight(values, scales)


def _panels(weight: torch.Tensor) -> torch.Tensor:
    """[out_features, in_features] -> [ceil(out_features / 32), in_features, 32], zeros at the end.

    Of fp32, uint16 or uint8.
    """
    out_features, in_features = weight.shape
    packed = torch.empty(-(-out_features // PANEL), in_features, PANEL, dtype=weight.dtype)
    rows = weight.contiguous().detach().numpy()
    run_tasks(_worker(str(rows.dtype)), get_num_threads(), rows, packed.numpy())
    return packed


@functools.cache
def _worker(dtype: str) -> Task:
    return compile_task(_PACKS[dtype])


_read_fp32 = argument_reader(types.float32[:, ::1], types.float32[:, :, ::1])
_read_uint16 = argument_reader(types.uint16[:, ::1], types.uint16[:, :, ::1])
_read_uint8 = argument_reader(types.uint8[:, ::1], types.uint8[:, :, ::1])


def _pack_fp32(worker: int, num_workers: int, at: int) -> None:
    _pack(worker, num_workers, *_read_fp32(at))


def _pack_uint16(worker: int, num_workers: int, at: int) -> None:
    _pack(worker, num_workers, *_read_uint16(at))


def _pack_uint8(worker: int, num_workers: int, at: int) -> None:
    _pack(worker, num_workers, *_read_uint8(at))


_PACKS = {"float32": _pack_fp32, "uint16": _pack_uint16, "uint8": _pack_uint8}
"""One function for each type: compiled code is found again by its function's name."""


@njit(error_model="numpy")
def _pack(worker: int, num_workers: int, weight: Any, packed: Any) -> None:
    """Panels in turns."""
    num_rows, in_features = weight.shape
    for panel in range(worker, len(packed), num_workers):
        width = min(PANEL, num_rows - panel * PANEL)
        for i in range(in_features):
            for column in range(width):
                packed[panel, i, column] = weight[panel * PANEL + column, i]
            for column in range(width, PANEL):
                packed[panel, i, column] = 0


def unpack(packed: PackedWeight, out_features: int) -> torch.Tensor:
    """The weight [out_features, in_features] in fp32."""
    return packed_rows(packed, torch.arange(out_features))


def packed_rows(packed: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` [num] int64 of the weight, e.g. embeddings that are tied to the output head.

    Returns [num, in_features] fp32, the same bits that products have.
    """
    panels, columns = ids // PANEL, ids % PANEL
    if packed.values.dtype == torch.uint8:
        half = PANEL // 2
        pairs = packed.values[panels, :, columns % half]
        values = pairs >> torch.where(columns < half, 0, 4)[:, None].to(torch.uint8) & 15
    elif packed.values.dtype == torch.uint16:
        values = packed.values.view(torch.bfloat16)[panels, :, columns]
    else:
        values = packed.values[panels, :, columns]
    if not len(packed.scales):
        return values.float()
    steps, lowest = packed.scales[panels, :, :, columns].unbind(-1)
    blocks = values.float().unflatten(1, (steps.shape[1], -1))
    return (blocks * steps[..., None] + lowest[..., None]).flatten(1)
