"""The innermost loop of products with packed weights: a register tile, fed by weights as stored.

Weights stay as narrow as their checkpoint has them and become fp32 in registers, exactly: with few
rows, what a product takes is the memory that it reads. So the bits are those of fp32 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from batchwright.kernels.aligned import CACHE_LINE_BYTES
from batchwright.kernels.fma_tile import build_tile, load_bf16
from batchwright.kernels.linear.packing import PANEL
from batchwright.kernels.simd import _address, _splat

FP32, BF16, FP16, INT8, INT4 = range(5)
"""How values are stored. The integers are in blocks of inputs, each with a step and a lowest value:
a weight is step * integer + lowest, rounded once."""

AHEAD_BYTES = 4096
"""How far before its use values are asked for: with few rows they come from memory as fast as they
are used, and the processor's own guesses end at every page."""

_INTP, _I32, _I8 = (ir.IntType(bits) for bits in (64, 32, 8))
_F32 = ir.FloatType()
_ROW_BYTES = {FP32: 4 * PANEL, BF16: 2 * PANEL, FP16: 2 * PANEL, INT8: PANEL, INT4: PANEL // 2}


@intrinsic
def fma_rows(
    typingctx: Any,
    form: Any,
    rows: Any,
    columns: Any,
    accumulate: Any,
    a: Any,
    a_offset: Any,
    a_stride: Any,
    values: Any,
    first_input: Any,
    column: Any,
    scales: Any,
    block_shift: Any,
    c: Any,
    c_offset: Any,
    c_stride: Any,
    length: Any,
    num_rows: Any,
) -> Any:
    """c[:num_rows, :columns] (+)= a[:num_rows, :length] @ `length` inputs of a panel.

    Args:
        form, rows, columns: compile-time constants: how values are stored, the most rows there are
            (there is code for every number of them), and the width: of a panel or half of one.
        accumulate: boolean, whether c is added to.
        a, a_offset, a_stride: fp32; offsets and strides count elements.
        values, first_input: packed values, and where they begin, counted in inputs of panels.
        column: of the panel, 0 or 16, where the tile begins.
        scales, block_shift: of blocks of 2^block_shift inputs; unused by floats.
        c, c_offset, c_stride: fp32, as a.
    """
    if not all(isinstance(arg, types.Literal) for arg in (form, rows, columns)):
        return None
    stored, most_rows = form.literal_value, rows.literal_value
    lanes = columns.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        a_at = _address(context, builder, kinds[4], args[4], args[5])
        c_at = _address(context, builder, kinds[12], args[12], args[13])
        panel = _Panel(
            values=_address(context, builder, kinds[7], args[7], _INTP(0)),
            scales=_address(context, builder, kinds[10], args[10], _INTP(0)),
            first_input=args[8],
            column=args[9],
            block_shift=args[11],
        )

        def load(builder: Any, k: Any) -> Any:
            return _LOADS[stored](builder, panel, builder.add(panel.first_input, k), lanes)

        end = builder.append_basic_block("rows.end")
        choice = builder.switch(args[16], end)
        for count in range(1, most_rows + 1):
            block = builder.append_basic_block(f"rows.{count}")
            choice.add_case(_INTP(count), block)
            builder.position_at_end(block)
            build_tile(
                builder, count, lanes, args[3], a_at, args[6], load, c_at, args[14], args[15]
            )
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    intp = types.intp
    signature = types.void(
        form, rows, columns, types.boolean, a, intp, intp, values, intp, intp, scales, intp,
        c, intp, intp, intp, intp,
    )  # fmt: skip
    return signature, codegen


@intrinsic
def widen(
    typingctx: Any,
    form: Any,
    columns: Any,
    values: Any,
    first_input: Any,
    scales: Any,
    block_shift: Any,
    out: Any,
    length: Any,
) -> Any:
    """out[:length * 32] = `length` inputs of a panel as fp32; arguments as of fma_rows."""
    if not all(isinstance(arg, types.Literal) for arg in (form, columns)):
        return None
    stored, lanes = form.literal_value, columns.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        out_at = _address(context, builder, kinds[6], args[6], _INTP(0))
        panel = _Panel(
            values=_address(context, builder, kinds[2], args[2], _INTP(0)),
            scales=_address(context, builder, kinds[4], args[4], _INTP(0)),
            first_input=args[3],
            column=_INTP(0),
            block_shift=args[5],
        )
        wide = ir.VectorType(_F32, lanes)
        with cgutils.for_range(builder, args[7]) as loop:
            index = builder.add(panel.first_input, loop.index)
            for column in range(0, PANEL, lanes):
                numbers = _LOADS[stored](
                    builder, panel._replace(column=_INTP(column)), index, lanes
                )
                start = builder.add(builder.mul(loop.index, _INTP(PANEL)), _INTP(column))
                at = builder.bitcast(builder.gep(out_at, [start]), wide.as_pointer())
                builder.store(numbers, at).align = 4
        return context.get_dummy_value()

    intp = types.intp
    return types.void(form, columns, values, intp, scales, intp, out, intp), codegen


class _Panel(NamedTuple):
    """Addresses and numbers that do not change within a tile."""

    values: Any
    scales: Any
    first_input: Any
    column: Any
    block_shift: Any


def _row(builder: Any, panel: _Panel, index: Any, form: int) -> Any:
    """Address (bytes) of the values of one input of a panel, of which those ahead are asked for."""
    row_bytes = _ROW_BYTES[form]
    first = builder.bitcast(panel.values, _I8.as_pointer())
    at = builder.gep(first, [builder.mul(index, _INTP(row_bytes))])
    for line in range(0, row_bytes, CACHE_LINE_BYTES):
        _prefetch(builder, at, AHEAD_BYTES + line)
    return at


def _load(builder: Any, address: Any, element: Any, lanes: int) -> Any:
    vector = builder.load(builder.bitcast(address, ir.VectorType(element, lanes).as_pointer()))
    vector.align = element.width // 8 if isinstance(element, ir.IntType) else 2
    return vector


def _at_column(builder: Any, row: Any, column: Any, itemsize: int) -> Any:
    return builder.gep(row, [builder.mul(column, _INTP(itemsize))])


def _load_fp32(builder: Any, panel: _Panel, index: Any, lanes: int) -> Any:
    at = _at_column(builder, _row(builder, panel, index, FP32), panel.column, 4)
    return builder.bitcast(_load(builder, at, _I32, lanes), ir.VectorType(_F32, lanes))


def _load_bf16(builder: Any, panel: _Panel, index: Any, lanes: int) -> Any:
    at = _at_column(builder, _row(builder, panel, index, BF16), panel.column, 2)
    return load_bf16(builder, at, lanes)


def _load_fp16(builder: Any, panel: _Panel, index: Any, lanes: int) -> Any:
    at = _at_column(builder, _row(builder, panel, index, FP16), panel.column, 2)
    halves = _load(builder, at, ir.HalfType(), lanes)
    return builder.fpext(halves, ir.VectorType(_F32, lanes))


def _load_int8(builder: Any, panel: _Panel, index: Any, lanes: int) -> Any:
    at = _at_column(builder, _row(builder, panel, index, INT8), panel.column, 1)
    integers = builder.sext(_load(builder, at, _I8, lanes), ir.VectorType(_I32, lanes))
    return _scaled(builder, panel, index, integers, lanes)


def _load_int4(builder: Any, panel: _Panel, index: Any, lanes: int) -> Any:
    """A byte holds the integers of a column of the first half and, in its high bits, one beyond."""
    half = PANEL // 2
    wide = ir.VectorType(_I32, half)
    row = _row(builder, panel, index, INT4)
    pairs = builder.zext(_load(builder, row, _I8, half), wide)
    fifteen = ir.Constant(wide, [ir.Constant(_I32, 15)] * half)
    if lanes == PANEL:
        low = builder.and_(pairs, fifteen)
        high = builder.lshr(pairs, ir.Constant(wide, [ir.Constant(_I32, 4)] * half))
        order = ir.Constant(ir.VectorType(_I32, PANEL), [_I32(i) for i in range(PANEL)])
        integers = builder.shuffle_vector(low, high, order)
    else:
        bits = builder.trunc(builder.lshr(panel.column, _INTP(2)), _I32)  # of column 16: 4
        integers = builder.and_(builder.lshr(pairs, _splat(builder, bits, half)), fifteen)
    return _scaled(builder, panel, index, integers, lanes)


def _scaled(builder: Any, panel: _Panel, index: Any, integers: Any, lanes: int) -> Any:
    block = builder.lshr(index, panel.block_shift)
    start = builder.add(builder.mul(block, _INTP(2 * PANEL)), panel.column)
    wide = ir.VectorType(_F32, lanes)
    step, lowest = (
        builder.bitcast(
            _load(builder, builder.gep(panel.scales, [builder.add(start, _INTP(at))]), _I32, lanes),
            wide,
        )
        for at in (0, PANEL)
    )
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(wide, [wide] * 3), f"llvm.fma.v{lanes}f32"
    )
    return builder.call(fma, [builder.sitofp(integers, wide), step, lowest])


_LOADS: dict[int, Callable[[Any, _Panel, Any, int], Any]] = {
    FP32: _load_fp32,
    BF16: _load_bf16,
    FP16: _load_fp16,
    INT8: _load_int8,
    INT4: _load_int4,
}


def _prefetch(builder: Any, address: Any, num_bytes: int) -> None:
    """Ask for the line at address + num_bytes; it may lie outside of any memory."""
    byte = _I8.as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32]), "llvm.prefetch.p0"
    )
    ahead = builder.gep(builder.bitcast(address, byte), [_INTP(num_bytes)])
    read, keep, data = _I32(0), _I32(3), _I32(1)
    builder.call(function, [ahead, read, keep, data])
