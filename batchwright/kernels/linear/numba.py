"""Products with packed weights on CPU, in fp32.

Few rows are the rule in decoding, and there BLAS libraries are far from what memory and the vector
units give. Here a task is one panel of 32 outputs for a run of rows; it reads the panel once from
memory and then from cache, for as many rows at a time as have their sums in registers.

Exactness level *bits*: every output is one chain of fused multiply-adds over in_features in their
order, then the bias, whatever the number of rows, threads and the width of registers.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import config, literally, njit, types

from batchwright.errors import ShapeError
from batchwright.kernels.arguments import argument_reader
from batchwright.kernels.atomics import next_task
from batchwright.kernels.linear.packing import PANEL
from batchwright.kernels.linear.panel_tile import BF16, FP16, FP32, INT4, INT8, fma_rows, widen
from batchwright.kernels.parallel import Task, compile_task, run_tasks, threads_for, zero_counters

WIDE_REGISTERS = "avx512f" in (
    config.CPU_FEATURES  # type: ignore[attr-defined]  # the user's own NUMBA_CPU_FEATURES
    or [name for name, there in get_host_cpu_features().items() if there]
)
TILE_ROWS = (14, 14, 14, 12, 12) if WIDE_REGISTERS else (6, 6, 6, 5, 5)
TILE_COLUMNS = PANEL if WIDE_REGISTERS else PANEL // 2
"""Rows whose sums are in registers at once, by form: 28 of 32 registers of 16 lanes with the whole
panel, or 12 of 16 of 8 lanes with half of it. Integers need some to become numbers."""

DEPTH = 2048
"""Input features that are multiplied at a time: 256 KiB of a panel, which a core's cache keeps."""

WIDEN_TILES = 4
"""Tiles of rows from which on the integers of a panel become fp32 once, in a core's cache, and not
in the registers of each tile."""

_MACS_PER_THREAD = 200_000
"""Multiply-adds that take some 5 us, what a parallel call costs more than a serial one."""


def linear(x: Any, values: Any, scales: Any, bias: Any, out: Any) -> None:
    """out = x W^T + b.

    Args:
        x: [num_tokens, in_features] fp32 numpy array, contiguous.
        values, scales: of a `packing.PackedWeight`, bf16 as uint16.
        bias: [out_features] fp32; of length 0 if there is none.
        out: [num_tokens, out_features] fp32, contiguous, written.
    Raises:
        ShapeError: shapes disagree or an array is not contiguous.

    In a fixed order of summation, level *bits*; torch's own result differs by its rounding.
    """
    num_rows, out_features = out.shape
    num_panels = -(-out_features // PANEL)
    form = _FORMS[values.dtype.str]
    width = PANEL // 2 if form == INT4 else PANEL
    if (
        x.shape != (num_rows, values.shape[1])
        or values.shape[0::2] != (num_panels, width)
        or len(bias) not in (0, out_features)
        or (form >= INT8 and not _are_blocks(scales, num_panels, values.shape[1]))
    ):
        raise ShapeError(
            f"linear: x {x.shape}, values {values.shape}, scales {scales.shape}, bias {bias.shape} "
            f"and out {out.shape} disagree"
        )
    if not all(a.flags.c_contiguous for a in (x, values, scales, out)):
        raise ShapeError("linear: arrays must be contiguous; call .contiguous()")
    macs = num_rows * num_panels * PANEL * values.shape[1]
    threads = threads_for(macs, _MACS_PER_THREAD)
    # More tasks than threads, so that all have work; but whole tiles, as far as there are such.
    chunks = min(-(-num_rows // TILE_ROWS[form]), -(-4 * threads // num_panels))
    if form == FP16:
        values = values.view(np.uint16)  # Numba has no type of 16-bit floats on CPUs
    run_tasks(_worker(form), threads, x, values, scales, bias, out, chunks, zero_counters(1))


_FORMS = {"<f4": FP32, "<u2": BF16, "<f2": FP16, "|i1": INT8, "|u1": INT4}


def _are_blocks(scales: Any, num_panels: int, in_features: int) -> bool:
    """Whether scales are those of equal blocks of 2^n inputs."""
    if scales.ndim != 4 or scales.shape[0] != num_panels or scales.shape[2:] != (2, PANEL):
        return False
    block, rest = divmod(in_features, scales.shape[1])
    return rest == 0 and block.bit_count() == 1


@functools.cache
def _worker(form: int) -> Task:
    return compile_task(_WORK[form])


def _reader(value_type: Any) -> Any:
    f32 = types.float32
    return argument_reader(
        f32[:, ::1], value_type[:, :, ::1], f32[:, :, :, ::1], f32[::1], f32[:, ::1],
        types.int64, types.int64[::1],
    )  # fmt: skip


_read_fp32, _read_16_bits = _reader(types.float32), _reader(types.uint16)
_read_int8, _read_int4 = _reader(types.int8), _reader(types.uint8)

# One function for each form: compiled code is found again by its function's name.


def _work_fp32(i: int, n: int, at: int) -> None:
    _work(FP32, _read_fp32(at))


def _work_bf16(i: int, n: int, at: int) -> None:
    _work(BF16, _read_16_bits(at))


def _work_fp16(i: int, n: int, at: int) -> None:
    _work(FP16, _read_16_bits(at))


def _work_int8(i: int, n: int, at: int) -> None:
    _work(INT8, _read_int8(at))


def _work_int4(i: int, n: int, at: int) -> None:
    _work(INT4, _read_int4(at))


_WORK = (_work_fp32, _work_bf16, _work_fp16, _work_int8, _work_int4)


@njit(error_model="numpy")
def _work(form: Any, args: Any) -> None:
    """Take tasks, a panel and one of `chunks` equal runs of rows, until there are none left."""
    x, values, scales, bias, out, chunks, counter = args
    form = literally(form)
    num_rows, out_features = out.shape
    wide = np.empty(0, np.float32)
    if form >= INT8 and num_rows >= chunks * WIDEN_TILES * TILE_ROWS[form]:
        wide = np.empty(min(DEPTH, x.shape[1]) * PANEL, np.float32)
    task = next_task(counter)
    while task < len(values) * chunks:
        panel, chunk = task // chunks, task % chunks
        first, last = chunk * num_rows // chunks, (chunk + 1) * num_rows // chunks
        start = panel * PANEL
        width = min(PANEL, out_features - start)
        if width == PANEL:
            _product(form, x, values, scales, panel, first, last, wide, out, start, out_features)
        else:  # the last panel has columns that are not there
            columns = np.empty((last - first, PANEL), np.float32)
            at = -first * PANEL
            _product(form, x, values, scales, panel, first, last, wide, columns, at, PANEL)
            for row in range(first, last):
                for column in range(width):
                    out[row, start + column] = columns[row - first, column]
        if len(bias) > 0:
            for row in range(first, last):
                for column in range(start, start + width):
                    out[row, column] += bias[column]
        task = next_task(counter)


@njit(error_model="numpy")
def _product(
    form: Any,
    x: Any,
    values: Any,
    scales: Any,
    panel: int,
    first: int,
    last: int,
    wide: Any,
    out: Any,
    out_at: int,
    out_stride: int,
) -> None:
    """Rows [first, last) of x times a panel; row i goes to out from out_at + i * out_stride on.

    With `wide`, memory for DEPTH inputs, the panel becomes fp32 there first.
    """
    form = literally(form)
    length = x.shape[1]
    block_shift = 0
    if form >= INT8:
        while scales.shape[1] << block_shift < length:
            block_shift += 1
    tile_rows = TILE_ROWS[FP32] if len(wide) > 0 else TILE_ROWS[form]
    tiles = -(-(last - first) // tile_rows)
    for start in range(0, length, DEPTH):
        depth = min(DEPTH, length - start)
        if len(wide) > 0:
            at = panel * length + start
            widen(form, TILE_COLUMNS, values, at, scales, block_shift, wide, depth)
        for tile in range(tiles):
            row = first + tile * (last - first) // tiles
            rows = first + (tile + 1) * (last - first) // tiles - row
            for column in range(0, PANEL, TILE_COLUMNS):
                if len(wide) > 0:
                    fma_rows(
                        FP32, TILE_ROWS[FP32], TILE_COLUMNS, start > 0,
                        x, row * length + start, length,
                        wide, 0, column, scales, 0,
                        out, out_at + row * out_stride + column, out_stride,
                        depth, rows,
                    )  # fmt: skip
                else:
                    fma_rows(
                        form, TILE_ROWS[form], TILE_COLUMNS, start > 0,
                        x, row * length + start, length,
                        values, panel * length + start, column, scales, block_shift,
                        out, out_at + row * out_stride + column, out_stride,
                        depth, rows,
                    )  # fmt: skip
