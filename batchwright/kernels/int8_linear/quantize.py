"""Rows of activations to bytes, a scale for every 128: no row can change another's."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from batchwright.kernels import simd
from batchwright.kernels.int8_linear.packing import BLOCK, ZERO
from batchwright.kernels.simd import LANES, _address

SMALLEST = 1e-30
"""A block whose magnitudes are all smaller counts as zero."""

_MAGIC = 1.5 * 2**23
"""Added to a small fp32 number, it rounds it to an integer, to even, in the low bits of the sum."""


@njit(error_model="numpy")
def quantize_row(x: Any, row: int, levels: int, out: Any, scales: Any, starts: Any) -> None:
    """Bytes of a row, and what each of its blocks needs besides.

    Args:
        x: [num_tokens, in_features] fp32.
        levels: what the largest magnitude of a block becomes, 127 or 63.
        out: [num_tokens, blocks * 128] int8, out[row] is written, zero behind the row's end.
        scales: [num_tokens, blocks] fp32; NaN if the block has an infinity or NaN.
        starts: [num_tokens, blocks] int32: what weights that are 128 too large add to the sums of
            products, negated.
    """
    for block in range(scales.shape[1]):
        start = block * BLOCK
        length = min(BLOCK, x.shape[1] - start)
        at = row * x.shape[1] + start
        if length == BLOCK:
            scale, total = _quantize(x, at, BLOCK, levels, out, row * out.shape[1] + start)
        else:
            scale, total = _quantize(x, at, length, levels, out, row * out.shape[1] + start)
        scales[row, block] = scale
        starts[row, block] = -ZERO * total


@njit(error_model="numpy", forceinline=True)
def _quantize(x: Any, at: int, length: int, levels: int, out: Any, to: int) -> Any:
    """(scale, sum of the bytes) of a block; where its length is a constant, loops unroll."""
    zero = simd.constant(0.0)
    large, bad = zero, zero
    for k in range(0, BLOCK, LANES):
        v = _lanes(x, at + k, length - k)
        large, bad = simd.maximum(large, simd.absolute(v)), simd.fma(v, zero, bad)
    largest = simd.horizontal_max(large) + simd.horizontal_sum(bad)
    scale = inverse = types.float32(0.0)
    if not largest < types.float32(SMALLEST):
        scale = largest / types.float32(levels)
        inverse = types.float32(levels) / largest
    steps, magic = simd.splat(inverse), simd.constant(_MAGIC)
    total = zero
    for k in range(0, BLOCK, LANES):
        v = simd.add(simd.mul(_lanes(x, at + k, length - k), steps), magic)
        _store_bytes(out, to + k, v)
        total = simd.add(total, simd.sub(v, magic))
    if largest != largest:
        return scale, types.int64(0)
    return scale, types.int64(simd.horizontal_sum(total))


@njit(forceinline=True)
def _lanes(x: Any, at: int, left: int) -> Any:
    if left >= LANES:
        return simd.load(x, at)
    return simd.load_first(x, at, max(left, 0))


@intrinsic
def _store_bytes(typingctx: Any, array: Any, offset: Any, vector: Any) -> Any:
    """array[offset : offset + 8] = the lowest byte of each lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        eight = ir.VectorType(ir.IntType(8), LANES)
        integers = builder.bitcast(args[2], ir.VectorType(ir.IntType(32), LANES))
        address = _address(context, builder, signature.args[0], *args[:2])
        address = builder.bitcast(address, eight.as_pointer())
        builder.store(builder.trunc(integers, eight), address).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, simd.float32x8), codegen
