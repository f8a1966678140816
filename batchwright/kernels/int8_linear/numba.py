"""Products with int8 weights on CPU: activations are quantised inside the call.

A row's activations have a scale for every 128 of them: shared by the whole row, an outlier would
take the steps from all others (docs/int8.md has the loss of both).

The activations' bits depend on the processor (`dot_tile.py`): 8 where it can multiply bytes exactly
at full speed (VNNI) or where nothing is gained by less, 7 with AVX2 alone, whose sums of two
products would saturate. The values are those of naive.py with as many bits.

Lossy against fp32. Level *bits*: integer sums are exact, a row's scales are its own, and the blocks
are added up in a fixed order; so a row's bits depend on nothing but the row and how many bits the
processor has for it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import literally, njit, types

from batchwright.errors import ShapeError
from batchwright.kernels.arguments import argument_reader
from batchwright.kernels.atomics import add_done, next_task, wait_for
from batchwright.kernels.int8_linear.dot_tile import (
    PAIRS_256,
    PAIRS_512,
    PLAIN,
    VECTORS,
    VNNI_256,
    VNNI_512,
    WAYS,
    best_way,
    dot_rows,
)
from batchwright.kernels.int8_linear.packing import BLOCK, GROUP, PANEL
from batchwright.kernels.int8_linear.quantize import quantize_row
from batchwright.kernels.parallel import (
    Task,
    compile_task,
    run_tasks,
    scratch,
    threads_for,
    zero_counters,
)

_MACS_PER_THREAD = 500_000
"""Multiply-adds that take some 2 us, what a parallel call costs more than a serial one."""

_ROWS_PER_TASK = 16
"""Rows that a task quantises."""

_TILE_ROWS = tuple(WAYS[way].rows for way in range(len(WAYS)))
_TILE_COLUMNS = tuple(VECTORS * WAYS[way].lanes for way in range(len(WAYS)))
_LEVELS = tuple(WAYS[way].levels for way in range(len(WAYS)))


@functools.cache
def activation_bits() -> int:
    """Bits of activations on this processor: 8 or 7."""
    return WAYS[best_way()].bits


def int8_linear(x: Any, values: Any, channels: Any, out: Any, way: int | None = None) -> None:
    """out = x W^T + b.

    Args:
        x: [num_tokens, in_features] fp32 numpy array, contiguous.
        values: [num_panels, groups, 32, 4] uint8, from `packing.pack`.
        channels: [2, num_panels * 32] fp32: scales of the outputs, then their bias.
        out: [num_tokens, out_features] fp32, contiguous, written.
        way: of `dot_tile`; None: the best of this processor.
    Raises:
        ShapeError: shapes disagree or an array is not contiguous.

    Rows with an infinity or NaN become NaN.
    """
    num_rows, out_features = out.shape
    num_panels = -(-out_features // PANEL)
    in_features = x.shape[1]
    if (
        len(x) != num_rows
        or values.shape != (num_panels, -(-in_features // GROUP), PANEL, GROUP)
        or channels.shape != (2, num_panels * PANEL)
    ):
        raise ShapeError(
            f"int8_linear: x {x.shape}, values {values.shape}, channels {channels.shape} "
            f"and out {out.shape} disagree"
        )
    if not all(a.flags.c_contiguous for a in (x, values, channels, out)):
        raise ShapeError("int8_linear: arrays must be contiguous; call .contiguous()")
    if way is None:
        way = best_way_here()
    threads = threads_for(num_rows * values.size, _MACS_PER_THREAD)
    # More tasks than threads, so that all have work; but whole tiles, as far as there are such.
    chunks = min(-(-num_rows // WAYS[way].rows), -(-4 * threads // num_panels))
    blocks = -(-in_features // BLOCK)
    run_tasks(
        _worker(way), threads, x, values, channels, out,
        scratch((num_rows, blocks * BLOCK), np.int8), scratch((num_rows, blocks), np.float32),
        scratch((num_rows, blocks), np.int32), chunks, zero_counters(2),
    )  # fmt: skip


best_way_here = functools.cache(best_way)


@functools.cache
def _worker(way: int) -> Task:
    return compile_task(_WORK[way])


_read = argument_reader(
    types.float32[:, ::1], types.uint8[:, :, :, ::1], types.float32[:, ::1],
    types.float32[:, ::1], types.int8[:, ::1], types.float32[:, ::1], types.int32[:, ::1],
    types.int64, types.int64[::1],
)  # fmt: skip

# One function for each way: compiled code is found again by its function's name.


def _work_vnni_512(i: int, n: int, at: int) -> None:
    _work(VNNI_512, _read(at))


def _work_vnni_256(i: int, n: int, at: int) -> None:
    _work(VNNI_256, _read(at))


def _work_pairs_512(i: int, n: int, at: int) -> None:
    _work(PAIRS_512, _read(at))


def _work_pairs_256(i: int, n: int, at: int) -> None:
    _work(PAIRS_256, _read(at))


def _work_plain(i: int, n: int, at: int) -> None:
    _work(PLAIN, _read(at))


_WORK = {
    VNNI_512: _work_vnni_512,
    VNNI_256: _work_vnni_256,
    PAIRS_512: _work_pairs_512,
    PAIRS_256: _work_pairs_256,
    PLAIN: _work_plain,
}


@njit(error_model="numpy")
def _work(way: Any, args: Any) -> None:
    """Take tasks until there are none left: runs of rows to quantise, then panels.

    A panel's task is one of `chunks` equal runs of rows. It waits for rows that others still
    quantise: those have been taken by workers that run, so nobody waits for ever.
    """
    x, values, channels, out, rows, scales, starts, chunks, counters = args
    way = literally(way)
    num_rows, out_features = out.shape
    quantising = -(-num_rows // _ROWS_PER_TASK)
    task = next_task(counters)
    while task < quantising:
        first = task * _ROWS_PER_TASK
        for row in range(first, min(first + _ROWS_PER_TASK, num_rows)):
            quantize_row(x, row, _LEVELS[way], rows, scales, starts)
        add_done(counters, 1)
        task = next_task(counters)
    wait_for(counters, 1, quantising)
    while task < quantising + len(values) * chunks:
        panel, chunk = (task - quantising) // chunks, (task - quantising) % chunks
        first, last = chunk * num_rows // chunks, (chunk + 1) * num_rows // chunks
        start = panel * PANEL
        width = min(PANEL, out_features - start)
        if width == PANEL:
            _product(
                way, rows, values, panel, first, last, scales, starts, channels,
                out, start, out_features,
            )  # fmt: skip
        else:  # the last panel has columns that are not there
            columns = np.empty((last - first, PANEL), np.float32)
            _product(
                way, rows, values, panel, first, last, scales, starts, channels,
                columns, -first * PANEL, PANEL,
            )  # fmt: skip
            for row in range(first, last):
                for column in range(width):
                    out[row, start + column] = columns[row - first, column]
        task = next_task(counters)


@njit(error_model="numpy")
def _product(
    way: Any,
    rows: Any,
    values: Any,
    panel: int,
    first: int,
    last: int,
    scales: Any,
    starts: Any,
    channels: Any,
    out: Any,
    out_at: int,
    out_stride: int,
) -> None:
    """Rows [first, last) times a panel; row i goes to out from out_at + i * out_stride on."""
    way = literally(way)
    groups, stride, blocks = values.shape[1], rows.shape[1], scales.shape[1]
    tiles = -(-(last - first) // _TILE_ROWS[way])
    for tile in range(tiles):
        row = first + tile * (last - first) // tiles
        count = first + (tile + 1) * (last - first) // tiles - row
        for column in range(0, PANEL, _TILE_COLUMNS[way]):
            dot_rows(
                way,
                rows, row * stride, stride,
                values, panel * groups * PANEL * GROUP + column * GROUP, groups,
                scales, starts, row * blocks, blocks,
                channels, panel * PANEL + column,
                out, out_at + row * out_stride + column, out_stride,
                count,
            )  # fmt: skip
