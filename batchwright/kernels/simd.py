"""Vectors of 8 or 32 fp32 numbers for Numba kernels, and the functions the kernels share.

Numba's auto-vectoriser may neither keep a tile of accumulators in registers nor promise the same
rounding in a loop's body and in its tail. Here a kernel says what it wants: `FloatVector` is a type
that njit code can hold in a variable, and every operation below is a few LLVM instructions (AVX on
x86, pairs of NEON registers on ARM). Nothing is reordered or contracted by the compiler: `fma` is
fused everywhere, `add` and `mul` are rounded separately everywhere. So a lane's bits depend on the
operations written in the kernel and on nothing else (contract 1, level *bits*).

Vectors of 32 are for loops over many numbers: the compiler cuts them into the registers there are,
two with AVX-512, four with AVX2. Operations take vectors of one length; in place of all but one of
them a Python number may stand, rounded to fp32, for as many lanes of it.

Offsets count elements from an array's first element, whatever its strides; no bounds are checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 8
MANY_LANES = 32

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_V8F = ir.VectorType(_F32, LANES)


class FloatVector(types.Type):  # type: ignore[misc]
    """Numba type of fp32 lanes."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Float32x{lanes}")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_F32, self.lanes)

    @property
    def llvm_int(self) -> ir.VectorType:
        return ir.VectorType(_I32, self.lanes)


float32x8 = FloatVector(LANES)
float32x32 = FloatVector(MANY_LANES)


@register_model(FloatVector)
class _FloatVectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


# --- helpers that build LLVM code -----------------------------------------------------------------


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [offset])


def _splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    vector_type = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, _I32(0))
    mask = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(vector_type, ir.Undefined), mask)


def _load(builder: Any, address: Any, vector_type: Any = _V8F) -> Any:
    vector = builder.load(builder.bitcast(address, vector_type.as_pointer()))
    vector.align = 4
    return vector


def _float_constant(value: float) -> Any:
    return ir.Constant(_V8F, [ir.Constant(_F32, value)] * LANES)


def _int_constant(value: int, lanes: int) -> Any:
    return ir.Constant(ir.VectorType(_I32, lanes), [ir.Constant(_I32, value)] * lanes)


def _lane_numbers(lanes: int) -> Any:
    return ir.Constant(ir.VectorType(_I32, lanes), [ir.Constant(_I32, i) for i in range(lanes)])


def _first_lanes(builder: Any, count: Any) -> Any:
    return builder.icmp_signed(
        "<", _lane_numbers(LANES), _splat(builder, builder.trunc(count, _I32))
    )


def _operation(build: Callable[..., Any]) -> Any:
    """Make an intrinsic of vectors of one length, in place of which numbers may stand.

    What is decorated takes (builder, type of the vectors, LLVM vectors...), gives an LLVM vector.
    """

    def typed(*args: Any) -> Any:
        vectors = {arg for arg in args if isinstance(arg, FloatVector)}
        if len(vectors) != 1:
            return None
        (vector,) = vectors
        numbers = (types.float32 if arg == types.float32 else types.float64 for arg in args)
        kinds = [
            vector if arg == vector else number for arg, number in zip(args, numbers, strict=True)
        ]

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            operands = [
                _as_lanes(builder, vector, kind, value)
                for kind, value in zip(signature.args, values, strict=True)
            ]
            return build(builder, vector, *operands)

        return vector(*kinds), codegen

    operations = (  # Numba reads how many arguments there are
        lambda typingctx, a: typed(a),
        lambda typingctx, a, b: typed(a, b),
        lambda typingctx, a, b, c: typed(a, b, c),
        lambda typingctx, a, b, c, d: typed(a, b, c, d),
    )
    operation = operations[len(inspect.signature(build).parameters) - 3]
    operation.__name__, operation.__doc__ = build.__name__, build.__doc__
    return intrinsic(operation)


def _as_lanes(builder: Any, vector: FloatVector, kind: Any, value: Any) -> Any:
    if kind == vector:
        return value
    number = builder.fptrunc(value, _F32) if kind == types.float64 else value
    return _splat(builder, number, vector.lanes)


# --- memory ---------------------------------------------------------------------------------------


@intrinsic
def load(typingctx: Any, array: Any, offset: Any) -> Any:
    """Lanes array[offset : offset + 8]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _address(context, builder, signature.args[0], *args))

    return float32x8(array, types.intp), codegen


@intrinsic
def load_many(typingctx: Any, array: Any, offset: Any) -> Any:
    """Lanes array[offset : offset + 32]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args)
        return _load(builder, address, float32x32.llvm)

    return float32x32(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, offset: Any, vector: Any) -> Any:
    """array[offset : offset + lanes] = vector."""
    if not isinstance(vector, FloatVector):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], builder.bitcast(address, vector.llvm.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


@intrinsic
def load_first(typingctx: Any, array: Any, offset: Any, count: Any) -> Any:
    """Lanes array[offset : offset + count], zeros after; memory beyond is not touched."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args[:2])
        address = builder.bitcast(address, _V8F.as_pointer())
        mask = _first_lanes(builder, args[2])
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_V8F, [address.type, _I32, mask.type, _V8F]),
            "llvm.masked.load.v8f32.p0",
        )
        return builder.call(function, [address, _I32(4), mask, _float_constant(0.0)])

    return float32x8(array, types.intp, types.intp), codegen


@intrinsic
def store_first(typingctx: Any, array: Any, offset: Any, count: Any, vector: Any) -> Any:
    """array[offset : offset + count] = the first `count` lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args[:2])
        address = builder.bitcast(address, _V8F.as_pointer())
        mask = _first_lanes(builder, args[2])
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [_V8F, address.type, _I32, mask.type]),
            "llvm.masked.store.v8f32.p0",
        )
        builder.call(function, [args[3], address, _I32(4), mask])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, float32x8), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line of array[offset]; it will be read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args)
        address = builder.bitcast(address, ir.IntType(8).as_pointer())
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32]),
            "llvm.prefetch.p0",
        )
        builder.call(function, [address, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def stored(typingctx: Any, array: Any, value: Any) -> Any:
    """An fp32 number as an element of an array: itself, in one of uint16 the bits of the nearest
    bf16, or in one of int8 a whole number, which it must be."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.return_type == types.float32:
            return args[1]
        if signature.return_type == types.int8:
            return builder.fptosi(args[1], ir.IntType(8))
        bits = builder.bitcast(args[1], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
        rounded = builder.select(
            builder.fcmp_unordered("uno", args[1], args[1]), _I32(0x7FC00000), rounded
        )
        return builder.trunc(builder.lshr(rounded, _I32(16)), ir.IntType(16))

    return array.dtype(array, types.float32), codegen


# --- arithmetic -----------------------------------------------------------------------------------


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """Eight lanes of one fp32 number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return float32x8(types.float32), codegen


@_operation
def add(builder: Any, vector: FloatVector, a: Any, b: Any) -> Any:
    """a + b, rounded on its own."""
    return builder.fadd(a, b)


@_operation
def sub(builder: Any, vector: FloatVector, a: Any, b: Any) -> Any:
    """a - b, rounded on its own."""
    return builder.fsub(a, b)


@_operation
def mul(builder: Any, vector: FloatVector, a: Any, b: Any) -> Any:
    """a * b, rounded on its own."""
    return builder.fmul(a, b)


@_operation
def div(builder: Any, vector: FloatVector, a: Any, b: Any) -> Any:
    """a / b, correctly rounded."""
    return builder.fdiv(a, b)


@_operation
def fma(builder: Any, vector: FloatVector, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector.llvm, [vector.llvm] * 3),
        f"llvm.fma.v{vector.lanes}f32",
    )
    return builder.call(function, [a, b, c])


@_operation
def maximum(builder: Any, vector: FloatVector, a: Any, b: Any) -> Any:
    """The larger lane; b where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_operation
def minimum(builder: Any, vector: FloatVector, a: Any, b: Any) -> Any:
    """The smaller lane; b where either is NaN."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@_operation
def where_less(builder: Any, vector: FloatVector, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x where a < b, else y."""
    return builder.select(builder.fcmp_ordered("<", a, b), x, y)


@_operation
def absolute(builder: Any, vector: FloatVector, a: Any) -> Any:
    """|a|."""
    bits = builder.bitcast(a, vector.llvm_int)
    bits = builder.and_(bits, _int_constant(0x7FFFFFFF, vector.lanes))
    return builder.bitcast(bits, vector.llvm)


@_operation
def copy_sign(builder: Any, vector: FloatVector, magnitude: Any, sign: Any) -> Any:
    """|magnitude| with the sign of `sign`."""
    size = builder.bitcast(magnitude, vector.llvm_int)
    size = builder.and_(size, _int_constant(0x7FFFFFFF, vector.lanes))
    sign = builder.bitcast(sign, vector.llvm_int)
    sign = builder.and_(sign, _int_constant(0x80000000, vector.lanes))
    return builder.bitcast(builder.or_(size, sign), vector.llvm)


@_operation
def power_of_two(builder: Any, vector: FloatVector, magic: Any) -> Any:
    """2**n, from n + 1.5 * 2**23: the low bits of that sum are the integer n."""
    bits = builder.bitcast(magic, vector.llvm_int)
    bits = builder.shl(bits, _int_constant(23, vector.lanes))
    return builder.bitcast(builder.add(bits, _int_constant(127 << 23, vector.lanes)), vector.llvm)


@intrinsic
def where_in_range(typingctx: Any, start: Any, end: Any, x: Any, y: Any) -> Any:
    """x in lanes start <= i < end, else the number y."""
    if not isinstance(x, FloatVector):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _lane_numbers(x.lanes)
        start, end = (_splat(builder, builder.trunc(arg, _I32), x.lanes) for arg in args[:2])
        mask = builder.and_(
            builder.icmp_signed(">=", lanes, start), builder.icmp_signed("<", lanes, end)
        )
        return builder.select(mask, args[2], _as_lanes(builder, x, types.float64, args[3]))

    return x(types.intp, types.intp, x, types.float64), codegen


def _horizontal(combine: Any, doc: str) -> Any:
    """Reduce lanes pairwise (of 8: i with i + 4, then + 2, then + 1): one fixed order."""

    def operation(typingctx: Any, a: Any) -> Any:
        if not isinstance(a, FloatVector):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector, shift = args[0], a.lanes // 2
            while shift:
                order = [ir.Constant(_I32, (i + shift) % a.lanes) for i in range(a.lanes)]
                moved = builder.shuffle_vector(vector, vector, ir.Constant(a.llvm_int, order))
                vector = combine(builder, vector, moved)
                shift //= 2
            return builder.extract_element(vector, _I32(0))

        return types.float32(a), codegen

    operation.__doc__ = doc
    return intrinsic(operation)


horizontal_sum = _horizontal(lambda builder, a, b: builder.fadd(a, b), "Sum of the lanes.")
horizontal_max = _horizontal(
    lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b), "Largest lane."
)


@njit(forceinline=True)
def constant(value: float) -> Any:
    """Eight lanes of a Python number, rounded to fp32."""
    return splat(types.float32(value))
