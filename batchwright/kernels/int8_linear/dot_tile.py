"""The innermost loop of int8 products: a register tile of int32 sums, as LLVM vector code.

Weights are unsigned bytes, 128 too large; activations are signed. So a sum begins at -128 times the
sum of its activations. Five ways to multiply four bytes of one by four of the other and add them to
an int32, all exact:

    VNNI_512, VNNI_256   vpdpbusd (AVX-512 VNNI, AVX-VNNI): one instruction
    PAIRS_512, PAIRS_256 pmaddubsw, pmaddwd, paddd (AVX-512BW, AVX2): the first adds two products
                         in a saturating int16, so activations have 7 bits: 2 * 255 * 63 < 2**15
    PLAIN                widening multiply and adds, as LLVM does them on any processor
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from batchwright.kernels.int8_linear.packing import BLOCK, GROUP, PANEL
from batchwright.kernels.simd import _splat

VNNI_512, VNNI_256, PAIRS_512, PAIRS_256, PLAIN = range(5)

VECTORS = 2
"""Registers of sums a row of the tile has."""


class Way(NamedTuple):
    """A way to multiply.

    Attributes:
        lanes: int32 sums of a register.
        rows: of a tile; so many registers of sums, and what the products need, fit the processor's.
        bits: of activations.
    """

    lanes: int
    rows: int
    bits: int

    @property
    def levels(self) -> int:
        """The largest activation."""
        return (1 << (self.bits - 1)) - 1


WAYS = {
    VNNI_512: Way(16, 14, 8),
    VNNI_256: Way(8, 6, 8),
    PAIRS_512: Way(16, 12, 7),
    PAIRS_256: Way(8, 5, 7),
    PLAIN: Way(8, 4, 8),
}


def best_way() -> int:
    """The fastest that this processor can."""
    features = get_host_cpu_features()
    needs = {
        VNNI_512: ("avx512f", "avx512vnni"),
        VNNI_256: ("avxvnni",),
        PAIRS_512: ("avx512bw",),
        PAIRS_256: ("avx2",),
    }
    for way, names in needs.items():
        if all(features.get(name, False) for name in names):
            return way
    return PLAIN


_INTP = ir.IntType(64)
_I8 = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_F32 = ir.FloatType()


@intrinsic
def dot_rows(
    typingctx: Any,
    way: Any,
    a: Any,
    a_offset: Any,
    a_stride: Any,
    b: Any,
    b_offset: Any,
    groups: Any,
    scales: Any,
    starts: Any,
    scales_offset: Any,
    blocks: Any,
    channels: Any,
    channels_offset: Any,
    c: Any,
    c_offset: Any,
    c_stride: Any,
    num_rows: Any,
) -> Any:
    """c = (sum over blocks of (a @ b + starts) * scales) * channels[0] + channels[1], for one tile.

    Args:
        way: compile-time constant; a tile has `num_rows` rows, 1 to WAYS[way].rows, and
            2 * WAYS[way].lanes columns.
        a: int8, rows of 4 * groups bytes or more, a_stride apart.
        b: uint8, groups of 32 columns x 4.
        scales, starts: [rows, blocks] fp32 and int32, from scales_offset on.
        channels: [2, columns] fp32, scale and bias, from channels_offset on.
        c: fp32, rows c_stride apart.

    Offsets and strides count elements. Blocks are added one after the other, each by a fused
    multiply-add; c holds the sums meanwhile.
    """
    if not isinstance(way, types.Literal):
        return None
    number = way.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def address(at: int, offset: Any) -> Any:
            data = context.make_array(signature.args[at])(context, builder, args[at]).data
            return builder.gep(data, [offset])

        row_of_channels = cgutils.unpack_tuple(
            builder, context.make_array(signature.args[11])(context, builder, args[11]).shape
        )[1]
        tile = _Tile(
            builder,
            number,
            a=address(1, args[2]),
            a_stride=args[3],
            b=address(4, args[5]),
            groups=args[6],
            scales=address(7, args[9]),
            starts=address(8, args[9]),
            blocks=args[10],
            channels=address(11, args[12]),
            biases=address(11, builder.add(args[12], row_of_channels)),
            c=address(13, args[14]),
            c_stride=args[15],
        )
        end = builder.append_basic_block("rows.end")
        choice = builder.switch(args[16], end)
        for count in range(1, WAYS[number].rows + 1):
            block = builder.append_basic_block(f"rows.{count}")
            choice.add_case(_INTP(count), block)
            builder.position_at_end(block)
            tile.build(count)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    at = types.intp
    signature = types.void(
        way, a, at, at, b, at, at, scales, starts, at, at, channels, at, c, at, at, at
    )  # fmt: skip
    return signature, codegen


class _Tile:
    """Builds the code of a tile for any number of rows."""

    def __init__(self, builder: Any, way: int, **operands: Any) -> None:
        self.builder = builder
        self.lanes = WAYS[way].lanes
        self.dot = _DOTS[way]
        self.at = operands

    def _vectors(self, pointer: Any, element: Any, lanes: int) -> list[Any]:
        """Two neighbouring vectors."""
        vector = ir.VectorType(element, lanes)
        first = self.builder.bitcast(pointer, vector.as_pointer())
        loaded = []
        for index in range(VECTORS):
            value = self.builder.load(self.builder.gep(first, [_INTP(index)]))
            value.align = 1
            loaded.append(value)
        return loaded

    def build(self, num_rows: int) -> None:
        """The loops over blocks and their groups; the builder goes on behind them."""
        builder, at = self.builder, self.at
        c_rows = [self._row("c", at["c_stride"], r) for r in range(num_rows)]
        with cgutils.for_range(builder, at["blocks"]) as blocks:
            first = builder.mul(blocks.index, _INTP(BLOCK // GROUP))
            left = builder.sub(at["groups"], first)
            whole = builder.icmp_signed("<", _INTP(BLOCK // GROUP), left)
            count = builder.select(whole, _INTP(BLOCK // GROUP), left)
            sums = self._sums(num_rows, blocks.index, first, builder.add(first, count))
            new = builder.icmp_signed("==", blocks.index, _INTP(0))
            for r, (c_row, row) in enumerate(zip(c_rows, sums, strict=True)):
                pointer = builder.gep(self._row("scales", at["blocks"], r), [blocks.index])
                scale = _splat(builder, builder.load(pointer), self.lanes)
                before = self._vectors(c_row, _F32, self.lanes)
                after = []
                for old, total in zip(before, row, strict=True):
                    value = builder.sitofp(total, old.type)
                    old = builder.select(new, ir.Constant(old.type, None), old)
                    after.append(builder.call(self._fma(old.type), [value, scale, old]))
                self._store(c_row, after)
        channels = self._vectors(at["channels"], _F32, self.lanes)
        biases = self._vectors(at["biases"], _F32, self.lanes)
        for c_row in c_rows:
            row = self._vectors(c_row, _F32, self.lanes)
            scaled = [builder.fmul(one, by) for one, by in zip(row, channels, strict=True)]
            self._store(
                c_row, [builder.fadd(one, b) for one, b in zip(scaled, biases, strict=True)]
            )

    def _sums(self, num_rows: int, block: Any, start: Any, end: Any) -> list[list[Any]]:
        """Sums of the products of groups [start, end), in registers."""
        builder, at = self.builder, self.at
        sums_type = ir.VectorType(_I32, self.lanes)
        rows = [self._row("a", at["a_stride"], r) for r in range(num_rows)]
        begin = [
            builder.load(builder.gep(self._row("starts", at["blocks"], r), [block]))
            for r in range(num_rows)
        ]
        begin = [_splat(builder, value, self.lanes) for value in begin]
        before = builder.block
        head = builder.append_basic_block("dot.head")
        body = builder.append_basic_block("dot.body")
        done = builder.append_basic_block("dot.done")
        builder.branch(head)

        builder.position_at_end(head)
        group = builder.phi(_INTP)
        group.add_incoming(start, before)
        sums = [[builder.phi(sums_type) for _ in range(VECTORS)] for _ in range(num_rows)]
        for row, first in zip(sums, begin, strict=True):
            for total in row:
                total.add_incoming(first, before)
        builder.cbranch(builder.icmp_signed("<", group, end), body, done)

        builder.position_at_end(body)
        panel = builder.gep(at["b"], [builder.mul(group, _INTP(PANEL * GROUP))])
        weights = self._vectors(panel, _I8, GROUP * self.lanes)
        byte = builder.mul(group, _INTP(GROUP))
        for pointer, row in zip(rows, sums, strict=True):
            four = builder.load(builder.bitcast(builder.gep(pointer, [byte]), _I32.as_pointer()))
            four.align = 1
            activations = _splat(builder, four, self.lanes)
            for total, weight in zip(row, weights, strict=True):
                total.add_incoming(self.dot(builder, total, activations, weight), body)
        group.add_incoming(builder.add(group, _INTP(1)), body)
        builder.branch(head)
        builder.position_at_end(done)
        return sums

    def _row(self, name: str, stride: Any, row: int) -> Any:
        return self.builder.gep(self.at[name], [self.builder.mul(stride, _INTP(row))])

    def _fma(self, floats: Any) -> Any:
        return cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{self.lanes}f32"
        )

    def _store(self, pointer: Any, vectors: list[Any]) -> None:
        """Neighbouring vectors."""
        first = self.builder.bitcast(pointer, vectors[0].type.as_pointer())
        for index, vector in enumerate(vectors):
            self.builder.store(vector, self.builder.gep(first, [_INTP(index)])).align = 4


# --- sums + four products of bytes; activations come as int32 lanes, weights as bytes -------------


def _vnni(bits: int) -> Callable[..., Any]:
    name, lanes = f"llvm.x86.avx512.vpdpbusd.{bits}", bits // 32

    def dot(builder: Any, total: Any, activations: Any, weights: Any) -> Any:
        kind = ir.VectorType(_I32, lanes)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind] * 3), name
        )
        return builder.call(function, [total, builder.bitcast(weights, kind), activations])

    return dot


def _pairs(bits: int, multiply: str, add_pairs: str) -> Callable[..., Any]:
    def dot(builder: Any, total: Any, activations: Any, weights: Any) -> Any:
        bytes_, words, sums = (ir.VectorType(t, bits // t.width) for t in (_I8, _I16, _I32))
        first = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(words, [bytes_] * 2), multiply
        )
        second = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(sums, [words] * 2), add_pairs
        )
        products = builder.call(first, [weights, builder.bitcast(activations, bytes_)])
        ones = ir.Constant(words, [ir.Constant(_I16, 1)] * words.count)
        return builder.add(total, builder.call(second, [products, ones]))

    return dot


def _plain(builder: Any, total: Any, activations: Any, weights: Any) -> Any:
    lanes = total.type.count
    bytes_ = ir.VectorType(_I8, GROUP * lanes)
    words = ir.VectorType(_I16, GROUP * lanes)
    # 255 * 127 fits an int16, the sum of two does not.
    products = builder.mul(
        builder.sext(builder.bitcast(activations, bytes_), words), builder.zext(weights, words)
    )
    for first in range(GROUP):
        order = [ir.Constant(_I32, GROUP * lane + first) for lane in range(lanes)]
        mask = ir.Constant(ir.VectorType(_I32, lanes), order)
        one = builder.shuffle_vector(products, products, mask)
        total = builder.add(total, builder.sext(one, total.type))
    return total


_DOTS = {
    VNNI_512: _vnni(512),
    VNNI_256: _vnni(256),
    PAIRS_512: _pairs(512, "llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    PAIRS_256: _pairs(256, "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
    PLAIN: _plain,
}
