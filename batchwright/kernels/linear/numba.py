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
from numba import njit, types

from batchwright.errors import ShapeError
from batchwright.kernels import get_num_threads
from batchwright.kernels.fma_tile import fma_rows
from batchwright.kernels.linear.packing import PANEL
from batchwright.kernels.parallel import compile_task, next_task, run_tasks

WIDE_REGISTERS = get_host_cpu_features().get("avx512f", False)
TILE_ROWS = 14 if WIDE_REGISTERS else 6
"""Rows whose sums are in registers at once: 28 of 32 registers of 16 lanes with the whole panel, or
12 of 16 of 8 lanes with half of it."""

DEPTH = 2048
"""Input features that are multiplied at a time: 256 KiB of a panel, which a core's cache keeps."""

_MACS_PER_THREAD = 200_000
"""Multiply-adds that take some 5 us, what a parallel call costs more than a serial one."""


def linear(x: Any, packed: Any, bias: Any, out: Any) -> None:
    """out = x W^T + b.

    Args:
        x: [num_tokens, in_features] fp32 numpy array, contiguous.
        packed: [num_panels, in_features, 32] fp32, from `packing.pack`.
        bias: [out_features] fp32; of length 0 if there is none.
        out: [num_tokens, out_features] fp32, contiguous, written.
    Raises:
        ShapeError: shapes disagree or an array is not contiguous.

    In a fixed order of summation, level *bits*; torch's own result differs by its rounding.
    """
    num_rows, out_features = out.shape
    num_panels = -(-out_features // PANEL)
    if (
        x.shape != (num_rows, packed.shape[1])
        or packed.shape[0::2] != (num_panels, PANEL)
        or len(bias) not in (0, out_features)
    ):
        raise ShapeError(
            f"linear: x {x.shape}, packed {packed.shape}, bias {bias.shape} and out {out.shape} "
            "disagree"
        )
    if not (x.flags.c_contiguous and packed.flags.c_contiguous and out.flags.c_contiguous):
        raise ShapeError("linear: arrays must be contiguous; call .contiguous()")
    threads = min(get_num_threads(), 1 + num_rows * packed.size // _MACS_PER_THREAD)
    # More tasks than threads, so that all have work; but whole tiles, as far as there are such.
    chunks = min(-(-num_rows // TILE_ROWS), -(-4 * threads // num_panels))
    counter = np.zeros(1, np.int64)
    run_tasks(_worker().address, threads, x, packed, bias, out, chunks, counter)


@functools.cache
def _worker() -> Any:
    f32 = types.float32
    return compile_task(
        _work, f32[:, ::1], f32[:, :, ::1], f32[::1], f32[:, ::1], types.int64, types.int64[::1]
    )


def _work(
    worker: int,
    num_workers: int,
    x: Any,
    packed: Any,
    bias: Any,
    out: Any,
    chunks: int,
    counter: Any,
) -> None:
    """Take tasks, a panel and one of `chunks` equal runs of rows, until there are none left."""
    num_rows, out_features = out.shape
    task = next_task(counter)
    while task < len(packed) * chunks:
        panel, chunk = task // chunks, task % chunks
        first, last = chunk * num_rows // chunks, (chunk + 1) * num_rows // chunks
        start = panel * PANEL
        width = min(PANEL, out_features - start)
        if width == PANEL:
            _product(x, packed, panel, first, last, out, start, out_features)
        else:  # the last panel has columns that are not there
            columns = np.empty((last - first, PANEL), np.float32)
            _product(x, packed, panel, first, last, columns, -first * PANEL, PANEL)
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
    x: Any, packed: Any, panel: int, first: int, last: int, out: Any, out_at: int, out_stride: int
) -> None:
    """Rows [first, last) of x times a panel; row i goes to out from out_at + i * out_stride on."""
    length = x.shape[1]
    tiles = -(-(last - first) // TILE_ROWS)
    for start in range(0, length, DEPTH):
        depth = min(DEPTH, length - start)
        b = (panel * length + start) * PANEL
        for tile in range(tiles):
            row = first + tile * (last - first) // tiles
            rows = first + (tile + 1) * (last - first) // tiles - row
            a, c = row * length + start, out_at + row * out_stride
            if WIDE_REGISTERS:
                fma_rows(
                    TILE_ROWS, 4, start > 0, x, a, length,
                    packed, b, PANEL, out, c, out_stride, depth, rows,
                )  # fmt: skip
            else:
                for half in range(0, PANEL, PANEL // 2):
                    fma_rows(
                        TILE_ROWS, 2, start > 0, x, a, length,
                        packed, b + half, PANEL, out, c + half, out_stride, depth, rows,
                    )  # fmt: skip
