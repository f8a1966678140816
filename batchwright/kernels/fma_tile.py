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

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from batchwright.kernels.simd import LANES, _address, _splat

AHEAD_BYTES = 4096
"""How far before its use fma_rows asks for b: with few rows it comes from memory as fast as it is
used, and the processor's own guesses end at every page."""
CACHE_LINE_BYTES = 64

_INTP = ir.IntType(64)
_I8, _I32 = ir.IntType(8), ir.IntType(32)
_I1 = ir.IntType(1)
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

    `rows`, `vectors` and `accumulate` are compile-time constants. Offsets and strides count
    elements; a stride is the distance between rows, and elements of a row are contiguous.
    """
    literals = (rows, vectors, accumulate)
    if not all(isinstance(arg, types.Literal) for arg in literals):
        return None
    num_rows, num_vectors, add_to_c = (arg.literal_value for arg in literals)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        operands = _operands(context, builder, signature, args)
        _build_tile(builder, num_rows, num_vectors, _I1(int(add_to_c)), *operands)
        return context.get_dummy_value()

    return _signature(literals, a, b, c), codegen


@intrinsic
def fma_rows(
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
    num_rows: Any,
) -> Any:
    """As fma_tile for the first `num_rows` rows, 1 to `rows`; both flags are known when it runs.

    `rows`, the most there are, and `vectors` are compile-time constants: there is code for every
    number of rows. `accumulate` is a boolean.
    """
    if not all(isinstance(arg, types.Literal) for arg in (rows, vectors)):
        return None
    most_rows, num_vectors = rows.literal_value, vectors.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        operands = _operands(context, builder, signature, args)
        end = builder.append_basic_block("rows.end")
        choice = builder.switch(args[13], end)
        for count in range(1, most_rows + 1):
            block = builder.append_basic_block(f"rows.{count}")
            choice.add_case(_INTP(count), block)
            builder.position_at_end(block)
            _build_tile(builder, count, num_vectors, args[2], *operands, ahead=AHEAD_BYTES)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    signature = _signature((rows, vectors, types.boolean), a, b, c)
    return types.void(*signature.args, types.intp), codegen


def _signature(literals: tuple[Any, ...], a: Any, b: Any, c: Any) -> Any:
    integers = (types.intp, types.intp)
    return types.void(*literals, a, *integers, b, *integers, c, *integers, types.intp)


def _operands(context: Any, builder: Any, signature: Any, args: Any) -> tuple[Any, ...]:
    """(address, stride) of a, b and c, then the length of the inner index."""
    operands = []
    for at in (3, 6, 9):
        address = _address(context, builder, signature.args[at], args[at], args[at + 1])
        operands += [address, args[at + 2]]
    return (*operands, args[12])


def _build_tile(
    builder: Any,
    num_rows: int,
    num_vectors: int,
    accumulate: Any,
    a: Any,
    a_stride: Any,
    b: Any,
    b_stride: Any,
    c: Any,
    c_stride: Any,
    length: Any,
    *,
    ahead: int = 0,
) -> None:
    """The loop over the inner index; the builder goes on behind it.

    With `ahead`, lines of b so many bytes on are asked for, also beyond its end.
    """
    lanes = LANES * num_vectors
    wide = ir.VectorType(_F32, lanes)
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(wide, [wide] * 3), f"llvm.fma.v{lanes}f32"
    )

    def load(pointer: Any) -> Any:
        vector = builder.load(builder.bitcast(pointer, wide.as_pointer()))
        vector.align = 4
        return vector

    c_rows = [builder.gep(c, [builder.mul(c_stride, _INTP(r))]) for r in range(num_rows)]
    a_rows = [builder.gep(a, [builder.mul(a_stride, _INTP(r))]) for r in range(num_rows)]
    zero = ir.Constant(wide, [ir.Constant(_F32, 0.0)] * lanes)
    start = [builder.select(accumulate, load(row), zero) for row in c_rows]

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
    b_at = builder.gep(b, [builder.mul(k, b_stride)])
    b_k = load(b_at)
    if ahead:
        for line in range(0, 4 * lanes, CACHE_LINE_BYTES):
            _prefetch(builder, b_at, ahead + line)
    for row, total in zip(a_rows, sums, strict=True):
        a_k = _splat(builder, builder.load(builder.gep(row, [k])), lanes)
        total.add_incoming(builder.call(fma, [a_k, b_k, total]), body)
    k.add_incoming(builder.add(k, _INTP(1)), body)
    builder.branch(head)

    builder.position_at_end(done)
    for row, total in zip(c_rows, sums, strict=True):
        builder.store(total, builder.bitcast(row, wide.as_pointer())).align = 4


def _prefetch(builder: Any, address: Any, num_bytes: int) -> None:
    pointer = builder.bitcast(address, _I8.as_pointer())
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32]),
        "llvm.prefetch.p0",
    )
    builder.call(function, [builder.gep(pointer, [_INTP(num_bytes)]), _I32(0), _I32(3), _I32(1)])
