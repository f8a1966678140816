"""Vectors of eight fp32 numbers for Numba kernels, and the functions the kernels share.

Numba's auto-vectoriser may neither keep a tile of accumulators in registers nor promise the same
rounding in a loop's body and in its tail. Here a kernel says what it wants: `Float32x8` is a type
that njit code can hold in a variable, and every operation below is a few LLVM instructions (AVX on
x86, pairs of NEON registers on ARM). Nothing is reordered or contracted by the compiler: `fma` is
fused everywhere, `add` and `mul` are rounded separately everywhere. So a lane's bits depend on the
operations written in the kernel and on nothing else (contract 1, level *bits*).

Offsets count elements from an array's first element, whatever its strides; no bounds are checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 8

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_V8F = ir.VectorType(_F32, LANES)
_V8I = ir.VectorType(_I32, LANES)


class Float32x8(types.Type):  # type: ignore[misc]
    """Numba type of eight fp32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="Float32x8")


float32x8 = Float32x8()


@register_model(Float32x8)
class _Float32x8Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _V8F)


# --- helpers that build LLVM code -----------------------------------------------------------------


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [offset])


def _splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    vector_type = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, _I32(0))
    mask = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(vector_type, ir.Undefined), mask)


def _load(builder: Any, address: Any) -> Any:
    vector = builder.load(builder.bitcast(address, _V8F.as_pointer()))
    vector.align = 4
    return vector


def _store(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.bitcast(address, _V8F.as_pointer())).align = 4


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_V8F, [_V8F] * 3), "llvm.fma.v8f32"
    )
    return builder.call(function, [a, b, c])


def _float_constant(value: float) -> Any:
    return ir.Constant(_V8F, [ir.Constant(_F32, value)] * LANES)


def _int_constant(value: int) -> Any:
    return ir.Constant(_V8I, [ir.Constant(_I32, value)] * LANES)


def _first_lanes(builder: Any, count: Any) -> Any:
    lanes = ir.Constant(_V8I, [ir.Constant(_I32, i) for i in range(LANES)])
    return builder.icmp_signed("<", lanes, _splat(builder, builder.trunc(count, _I32)))


# --- memory ---------------------------------------------------------------------------------------


@intrinsic
def load(typingctx: Any, array: Any, offset: Any) -> Any:
    """Lanes array[offset : offset + 8]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _address(context, builder, signature.args[0], *args))

    return float32x8(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, offset: Any, vector: Any) -> Any:
    """array[offset : offset + 8] = vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[2], _address(context, builder, signature.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, float32x8), codegen


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


def _binary(name: str, doc: str) -> Any:
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args)

        return float32x8(float32x8, float32x8), codegen

    operation.__doc__ = doc
    return intrinsic(operation)


add = _binary("fadd", "a + b, rounded on its own.")
sub = _binary("fsub", "a - b, rounded on its own.")
mul = _binary("fmul", "a * b, rounded on its own.")
div = _binary("fdiv", "a / b, correctly rounded.")


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fma(builder, *args)

    return float32x8(float32x8, float32x8, float32x8), codegen


@intrinsic
def maximum(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger lane; b where either is NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return float32x8(float32x8, float32x8), codegen


@intrinsic
def minimum(typingctx: Any, a: Any, b: Any) -> Any:
    """The smaller lane; b where either is NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return float32x8(float32x8, float32x8), codegen


@intrinsic
def where_less(typingctx: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x where a < b, else y."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args[:2]), *args[2:])

    return float32x8(float32x8, float32x8, float32x8, float32x8), codegen


@intrinsic
def where_in_range(typingctx: Any, start: Any, end: Any, x: Any, y: Any) -> Any:
    """x in lanes start <= i < end, else y."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.Constant(_V8I, [ir.Constant(_I32, i) for i in range(LANES)])
        start, end = (_splat(builder, builder.trunc(arg, _I32)) for arg in args[:2])
        mask = builder.and_(
            builder.icmp_signed(">=", lanes, start), builder.icmp_signed("<", lanes, end)
        )
        return builder.select(mask, *args[2:])

    return float32x8(types.intp, types.intp, float32x8, float32x8), codegen


@intrinsic
def absolute(typingctx: Any, a: Any) -> Any:
    """|a|."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.and_(builder.bitcast(args[0], _V8I), _int_constant(0x7FFFFFFF))
        return builder.bitcast(bits, _V8F)

    return float32x8(float32x8), codegen


@intrinsic
def copy_sign(typingctx: Any, magnitude: Any, sign: Any) -> Any:
    """|magnitude| with the sign of `sign`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        magnitude, sign = (builder.bitcast(arg, _V8I) for arg in args)
        magnitude = builder.and_(magnitude, _int_constant(0x7FFFFFFF))
        sign = builder.and_(sign, _int_constant(0x80000000))
        return builder.bitcast(builder.or_(magnitude, sign), _V8F)

    return float32x8(float32x8, float32x8), codegen


def _horizontal(combine: Any, doc: str) -> Any:
    """Reduce lanes pairwise (i with i + 4, then + 2, then + 1): one fixed order."""

    def operation(typingctx: Any, a: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector = args[0]
            for shift in (4, 2, 1):
                order = [ir.Constant(_I32, (i + shift) % LANES) for i in range(LANES)]
                moved = builder.shuffle_vector(vector, vector, ir.Constant(_V8I, order))
                vector = combine(builder, vector, moved)
            return builder.extract_element(vector, _I32(0))

        return types.float32(float32x8), codegen

    operation.__doc__ = doc
    return intrinsic(operation)


horizontal_sum = _horizontal(lambda builder, a, b: builder.fadd(a, b), "Sum of the lanes.")
horizontal_max = _horizontal(
    lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b), "Largest lane."
)


@intrinsic
def power_of_two(typingctx: Any, magic: Any) -> Any:
    """2**n as fp32 lanes, from n + 1.5 * 2**23: the low bits of that sum are the integer n."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.bitcast(args[0], _V8I), _int_constant(23))
        return builder.bitcast(builder.add(bits, _int_constant(127 << 23)), _V8F)

    return float32x8(float32x8), codegen


@njit(forceinline=True)
def constant(value: float) -> Any:
    """Eight lanes of a Python number, rounded to fp32."""
    return splat(types.float32(value))
