"""The innermost loop of our products: a register tile, rows x 8*vectors, as LLVM vector code.

Projections have this form (x @ a panel of W^T), and both products of attention: scores = q @ k
([rows, head_dim] x [head_dim, 32]) and out += p @ v ([rows, keys] x [keys, head_dim]).
Accumulators live in registers for the whole loop. Each element of c is one chain of fused
multiply-adds in the order of the inner index, so its bits are the same in every tile shape and
however a product is cut into several calls.

A row of the tile is one LLVM vector as wide as the tile; the compiler cuts it into the registers
there are, of 16 lanes with AVX-512, of 8 with AVX2. The width of a register changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from batchwright.kernels.simd import LANES, _address, _splat, float32x8

_INTP = ir.IntType(64)
_I1, _I32 = ir.IntType(1), ir.IntType(32)
_F32 = ir.FloatType()


@intrinsic
def fma_tile(
    typingctx: Any,
    rows: Any,
    vectors: Any,
    accumulate: Any,
    a: Any,
    a_offset: Any,
    a_stride: Any,
    b: Any,
    b_offset: Any,
    b_stride: Any,
    c: Any,
    c_offset: Any,
    c_stride: Any,
    length: Any,
) -> Any:
    """c[:rows, :8*vectors] (+)= a[:rows, :length] @ b[:length, :8*vectors], all fp32.

    b may be uint16, the bits of bf16 numbers, or int8; both become fp32 as they are loaded.

    `rows`, `vectors` and `accumulate` are compile-time constants. Offsets and strides count
    elements; a stride is the distance between rows, and elements of a row are contiguous.
    """
    literals = (rows, vectors, accumulate)
    if not all(isinstance(arg, types.Literal) for arg in literals):
        return None
    num_rows, num_vectors, add_to_c = (arg.literal_value for arg in literals)
    lanes = LANES * num_vectors

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a_at, b_at, c_at = (
            _address(context, builder, signature.args[at], args[at], args[at + 1])
            for at in (3, 6, 9)
        )

        def load(builder: Any, k: Any) -> Any:
            row = builder.gep(b_at, [builder.mul(k, args[8])])
            if signature.args[6].dtype == types.uint16:
                return load_bf16(builder, row, lanes)
            if signature.args[6].dtype == types.int8:
                return load_int8(builder, row, lanes)
            return _load(builder, row, ir.VectorType(_F32, lanes))

        build_tile(
            builder, num_rows, lanes, _I1(int(add_to_c)),
            a_at, args[5], load, c_at, args[11], args[12],
        )  # fmt: skip
        return context.get_dummy_value()

    strides = (types.intp, types.intp)
    return types.void(*literals, a, *strides, b, *strides, c, *strides, types.intp), codegen


@intrinsic
def load_wide(typingctx: Any, array: Any, offset: Any) -> Any:
    """Eight lanes array[offset : offset + 8] as fp32, from fp32, the bits of bf16, or int8."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _address(context, builder, signature.args[0], *args)
        if signature.args[0].dtype == types.uint16:
            return load_bf16(builder, at, LANES)
        if signature.args[0].dtype == types.int8:
            return load_int8(builder, at, LANES)
        return _load(builder, at, ir.VectorType(_F32, LANES))

    return float32x8(array, types.intp), codegen


def build_tile(
    builder: Any,
    num_rows: int,
    lanes: int,
    accumulate: Any,
    a: Any,
    a_stride: Any,
    load_b: Callable[[Any, Any], Any],
    c: Any,
    c_stride: Any,
    length: Any,
) -> None:
    """Write the loop over the inner index; the builder goes on behind it.

    Args:
        accumulate: a boolean of the code that is built.
        load_b: of (builder, inner index): writes what gives the vector of b.
    """
    wide = ir.VectorType(_F32, lanes)
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(wide, [wide] * 3), f"llvm.fma.v{lanes}f32"
    )

    c_rows = [builder.gep(c, [builder.mul(c_stride, _INTP(r))]) for r in range(num_rows)]
    a_rows = [builder.gep(a, [builder.mul(a_stride, _INTP(r))]) for r in range(num_rows)]
    zero = ir.Constant(wide, [ir.Constant(_F32, 0.0)] * lanes)
    start = [builder.select(accumulate, _load(builder, row, wide), zero) for row in c_rows]

    before = builder.block
    head = builder.append_basic_block("tile.head")
    body = builder.append_basic_block("tile.body")
    done = builder.append_basic_block("tile.done")
    builder.branch(head)

    builder.position_at_end(head)
    k = builder.phi(_INTP)
    k.add_incoming(_INTP(0), before)
    sums = [builder.phi(wide) for _ in range(num_rows)]
    for total, first in zip(sums, start, strict=True):
        total.add_incoming(first, before)
    builder.cbranch(builder.icmp_signed("<", k, length), body, done)

    builder.position_at_end(body)
    b_k = load_b(builder, k)
    for row, total in zip(a_rows, sums, strict=True):
        a_k = _splat(builder, builder.load(builder.gep(row, [k])), lanes)
        total.add_incoming(builder.call(fma, [a_k, b_k, total]), body)
    k.add_incoming(builder.add(k, _INTP(1)), body)
    builder.branch(head)

    builder.position_at_end(done)
    for row, total in zip(c_rows, sums, strict=True):
        builder.store(total, builder.bitcast(row, wide.as_pointer())).align = 4


def load_bf16(builder: Any, address: Any, lanes: int) -> Any:
    """bf16 numbers at an address, exactly as fp32."""
    wide = ir.VectorType(_I32, lanes)
    narrow = ir.VectorType(ir.IntType(16), lanes)
    bits = builder.load(builder.bitcast(address, narrow.as_pointer()))
    bits.align = 2
    high = builder.shl(builder.zext(bits, wide), ir.Constant(wide, [_I32(16)] * lanes))
    return builder.bitcast(high, ir.VectorType(_F32, lanes))


def load_int8(builder: Any, address: Any, lanes: int) -> Any:
    """Numbers of 8 bits at an address, exactly as fp32."""
    narrow = ir.VectorType(ir.IntType(8), lanes)
    numbers = builder.load(builder.bitcast(address, narrow.as_pointer()))
    numbers.align = 1
    wide = builder.sext(numbers, ir.VectorType(_I32, lanes))
    return builder.sitofp(wide, ir.VectorType(_F32, lanes))


def _load(builder: Any, address: Any, wide: Any) -> Any:
    vector = builder.load(builder.bitcast(address, wide.as_pointer()))
    vector.align = 4
    return vector
