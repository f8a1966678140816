"""What the kernels over logit rows share: ordered keys, group maxima, exp. Numba, vectorised.

Everything here is written so that its bits follow from IEEE arithmetic alone (no reassociation, no
contraction), and `weights` in naive.py repeats it in NumPy bit for bit.

A row is looked at in groups of GROUP tokens. The maximum of each group is taken once; whatever a
later pass looks for (a threshold, a nucleus, a winner), most groups are ruled out by theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")
"""Decorator of functions called by kernels only; without wrappers they compile in half the time."""

inlined = njit(
    no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy", forceinline=True
)
"""The same for functions that a loop must see through to be vectorised."""

GROUP = 64
"""Tokens per group: sixteen Philox blocks, eight AVX registers of logits."""

MAX_VOCAB_SIZE = 2**19
"""Sums of this many weights (multiples of 2^-34, at most 1) are exact in float64."""

WEIGHTLESS = -35.5
"""2^y rounds to a weight of zero below this y."""

MINUS_INF_KEY = np.int32(-2139095041)
PLUS_INF_KEY = np.int32(0x7F800000)


def num_groups(vocab_size: int) -> int:
    """Groups of a row; the last may be short."""
    return -(-vocab_size // GROUP)


@intrinsic
def float_bits(typingctx: Any, x: Any) -> Any:
    """The int32 with the bits of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def bits_float(typingctx: Any, i: Any) -> Any:
    """The float32 with the bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


_SIGN_REST = np.int32(0x7FFFFFFF)
_SHIFT_31 = np.int32(31)
_ZERO = np.float32(0.0)


@inlined
def order_key(x):  # type: ignore[no-untyped-def]
    """An int32 that orders as the float32 does; -0.0 and 0.0 have one key, NaNs lie outside.

    Integer maxima vectorise without promising the compiler that there are no NaNs.
    """
    bits = float_bits(x + _ZERO)
    return np.int32(bits ^ (np.int32(bits >> _SHIFT_31) & _SIGN_REST))


@inlined
def key_float(key):  # type: ignore[no-untyped-def]
    """The float32 whose order_key this is."""
    return bits_float(np.int32(key ^ (np.int32(key >> _SHIFT_31) & _SIGN_REST)))


@inner
def group_maxima(row, maxima):  # type: ignore[no-untyped-def]
    """Keys of the maximum of every group of `row` into `maxima`; returns (largest, smallest) key.

    A key outside [MINUS_INF_KEY, PLUS_INF_KEY] is a NaN.
    """
    size = len(row)
    largest = np.int32(-2147483648)
    smallest = np.int32(2147483647)
    for group in range((size + GROUP - 1) // GROUP):
        start = group * GROUP
        top = np.int32(-2147483648)
        if start + GROUP <= size:
            for i in range(GROUP):
                key = order_key(row[start + i])
                top = max(top, key)
                smallest = min(smallest, key)
        else:
            for i in range(start, size):
                key = order_key(row[i])
                top = max(top, key)
                smallest = min(smallest, key)
        maxima[group] = top
        largest = max(largest, top)
    return largest, smallest


@inner
def first_maximum(row, maxima, largest):  # type: ignore[no-untyped-def]
    """The lowest id among the largest logits."""
    group = 0
    while maxima[group] != largest:
        group += 1
    token = group * GROUP
    while order_key(row[token]) != largest:
        token += 1
    return token


@inner
def is_sound(largest, smallest):  # type: ignore[no-untyped-def]
    """The row has neither NaN nor +inf, and at least one finite logit."""
    return smallest >= MINUS_INF_KEY and MINUS_INF_KEY < largest < PLUS_INF_KEY


_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds a small float32 to an integer
_ROUND_BITS = np.int32(0x4B400000 - 127)
_SHIFT_23 = np.int32(23)
_LOWEST = np.float32(-126.0)
_ONE = np.float32(1.0)
# 2^r = 1 + r (C1 + r (C2 + ...)) on [-1/2, 1/2], minimax, relative error 9.2e-8; exact at 0.
_C1 = np.float32(0.6931470036506653)
_C2 = np.float32(0.24022242426872253)
_C3 = np.float32(0.05550733581185341)
_C4 = np.float32(0.009671512991189957)
_C5 = np.float32(0.001326472731307149)


@inlined
def exp2_32(y):  # type: ignore[no-untyped-def]
    """2^y for float32 y <= 127; 2^-126 below -126. Relative error under 2e-7; 1 exactly at 0."""
    y = y if y > _LOWEST else _LOWEST
    rounded = y + _ROUND
    r = y - (rounded - _ROUND)
    p = ((((_C5 * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _ONE
    return p * bits_float(np.int32(np.int32(float_bits(rounded) - _ROUND_BITS) << _SHIFT_23))


_QUANTUM = np.float32(2.0**-11)  # adding and subtracting it rounds to a multiple of 2^-34


@inlined
def weight(y):  # type: ignore[no-untyped-def]
    """2^y, y <= 0, rounded to a multiple of 2^-34, so that float64 sums of weights are exact."""
    e = exp2_32(y)
    rounded = (e + _QUANTUM) - _QUANTUM
    return rounded if e < _QUANTUM else e
