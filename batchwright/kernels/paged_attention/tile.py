"""The matrix product of paged attention: a register tile, rows x 8*vectors, as LLVM vector code.

Both products of attention have this form: scores = q @ k_block ([rows, head_dim] x [head_dim, 32])
and out += p @ v_block ([rows, keys] x [keys, head_dim]). Accumulators live in registers for the
whole loop. Each element of c is one chain of fused multiply-adds in the order of the inner index,
so its bits are the same in every tile shape and however a product is cut into several calls.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from batchwright.kernels.simd import _V8F, _address, _float_constant, _fma, _load, _splat, _store

_INTP = ir.IntType(64)


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
        a_ptr = _address(context, builder, signature.args[3], args[3], args[4])
        b_ptr = _address(context, builder, signature.args[6], args[6], args[7])
        c_ptr = _address(context, builder, signature.args[9], args[9], args[10])
        a_step, b_step, c_step, end = args[5], args[8], args[11], args[12]
        cells = [(r, v) for r in range(num_rows) for v in range(num_vectors)]

        def at(pointer: Any, step: Any, row: int, column: int) -> Any:
            offset = builder.mul(step, _INTP(row))
            return builder.gep(pointer, [builder.add(offset, _INTP(column))])

        c_at = {(r, v): at(c_ptr, c_step, r, 8 * v) for r, v in cells}
        a_rows = [at(a_ptr, a_step, r, 0) for r in range(num_rows)]
        zero = _float_constant(0.0)
        start = {cell: _load(builder, c_at[cell]) if add_to_c else zero for cell in cells}

        before = builder.block
        head = builder.append_basic_block("tile.head")
        body = builder.append_basic_block("tile.body")
        done = builder.append_basic_block("tile.done")
        builder.branch(head)

        builder.position_at_end(head)
        k = builder.phi(_INTP)
        k.add_incoming(_INTP(0), before)
        sums = {cell: builder.phi(_V8F) for cell in cells}
        for cell in cells:
            sums[cell].add_incoming(start[cell], before)
        builder.cbranch(builder.icmp_signed("<", k, end), body, done)

        builder.position_at_end(body)
        b_row = builder.gep(b_ptr, [builder.mul(k, b_step)])
        a_k = [_splat(builder, builder.load(builder.gep(row, [k]))) for row in a_rows]
        for v in range(num_vectors):
            b_kv = _load(builder, builder.gep(b_row, [_INTP(8 * v)]))
            for r in range(num_rows):
                total = _fma(builder, a_k[r], b_kv, sums[r, v])
                sums[r, v].add_incoming(total, body)
        k.add_incoming(builder.add(k, _INTP(1)), body)
        builder.branch(head)

        builder.position_at_end(done)
        for cell in cells:
            _store(builder, sums[cell], c_at[cell])
        return context.get_dummy_value()

    arrays_at = {3, 6, 9}
    given = (rows, vectors, accumulate, a, a_offset, a_stride, b, b_offset, b_stride, c)
    typed = [arg if i in arrays_at or i < 3 else types.intp for i, arg in enumerate(given)]
    return types.void(*typed, types.intp, types.intp, types.intp), codegen
