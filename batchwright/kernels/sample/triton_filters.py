"""Where top_k and top_p cut a row, on a GPU: a short list of tokens, and bisection over it.

The weights and their sums are those of rowmath.py and naive.py, bit for bit (kernels that call this
are compiled without fused multiply-adds), and sums of such weights are exact in any order: so the
cuts are those of filters.py.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from batchwright.kernels.sample import rowmath

_MINUS_INF_KEY = tl.constexpr(int(rowmath.MINUS_INF_KEY))
_C1 = tl.constexpr(0.6931470036506653)
_C2 = tl.constexpr(0.24022242426872253)
_C3 = tl.constexpr(0.05550733581185341)
_C4 = tl.constexpr(0.009671512991189957)
_C5 = tl.constexpr(0.001326472731307149)
_ROUND = tl.constexpr(12582912.0)
_ROUND_BITS = tl.constexpr(0x4B400000 - 127)
_QUANTUM = tl.constexpr(2.0**-11)


@triton.jit
def order_key(x: tl.tensor) -> tl.tensor:
    """An int64 in int32's range that orders as the fp32 does; both zeros have one key."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def key_float(key: tl.tensor) -> tl.tensor:
    """The fp32 whose order_key this is."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight(y: tl.tensor) -> tl.tensor:
    """2^y, y <= 0, fp32, in multiples of 2^-34: the operations of rowmath.weight."""
    y = tl.where(y > -126.0, y, -126.0)
    rounded = y + _ROUND
    r = y - (rounded - _ROUND)
    p = ((((r * _C5 + _C4) * r + _C3) * r + _C2) * r + _C1) * r + 1.0
    e = p * ((rounded.to(tl.int32, bitcast=True) - _ROUND_BITS) << 23).to(tl.float32, bitcast=True)
    return tl.where(e < _QUANTUM, (e + _QUANTUM) - _QUANTUM, e)


@triton.jit
def kth_largest(values: tl.tensor, k: tl.tensor) -> tl.tensor:
    """Largest float that at least k of `values` (a block, k <= its size) reach."""
    low = tl.full([], _MINUS_INF_KEY, tl.int64)
    high = order_key(tl.max(values, 0)) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum((values >= key_float(middle)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return key_float(low)


@triton.jit
def mass(list_logits: tl.tensor, size: tl.tensor, bound: tl.tensor, top: tl.tensor,
         inverse: tl.tensor, BLOCK: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Sum of the weights (COUNT: number) of the listed logits >= bound, fp64, exact."""
    total = tl.zeros([], tl.float64)
    start = 0
    while start < size:
        at = start + tl.arange(0, BLOCK)
        logits = tl.load(list_logits + at, mask=at < size, other=float("-inf"))
        inside = (logits >= bound) & (at < size)
        if COUNT:
            total += tl.sum(inside.to(tl.int32), 0).to(tl.float64)
        else:
            weights = tl.where(inside, weight((logits - top) * inverse), 0.0)
            total += tl.sum(weights.to(tl.float64), 0)
        start += BLOCK
    return total


@triton.jit
def bisect(list_logits: tl.tensor, size: tl.tensor, low: tl.tensor, target: tl.tensor,
           top: tl.tensor, inverse: tl.tensor, BLOCK: tl.constexpr,
           COUNT: tl.constexpr) -> Any:  # fmt: skip
    """(cut, above): the largest logit at which the mass reaches `target`, and the mass above it.

    The mass of the listed logits >= low must reach it.
    """
    low = order_key(low)
    high = order_key(top) + 1
    above = tl.zeros([], tl.float64)
    while high - low > 1:
        middle = low + (high - low) // 2
        found = mass(list_logits, size, key_float(middle), top, inverse, BLOCK, COUNT)
        low = tl.where(found >= target, middle, low)
        high = tl.where(found >= target, high, middle)
        above = tl.where(found >= target, above, found)
    return key_float(low), above


@triton.jit
def last_kept(list_logits: tl.tensor, list_tokens: tl.tensor, size: tl.tensor, cut: tl.tensor,
              above: tl.tensor, target: tl.tensor, top: tl.tensor, inverse: tl.tensor,
              BLOCK: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Highest kept id among the tokens that tie at `cut`: as few as bring `above` to `target`."""
    one = weight((cut - top) * inverse).to(tl.float64)
    needed = tl.ceil((target - above) / one)
    # the quotient is rounded; products and sums of these are not
    needed = tl.where(
        (needed > 1.0) & (above + (needed - 1.0) * one >= target), needed - 1.0, needed
    )
    needed = tl.where(above + needed * one < target, needed + 1.0, needed)
    num = tl.maximum(needed, 1.0).to(tl.int32)
    seen = 0
    last = -1
    start = 0
    while start < size:
        at = start + tl.arange(0, BLOCK)
        logits = tl.load(list_logits + at, mask=at < size, other=float("-inf"))
        tokens = tl.load(list_tokens + at, mask=at < size, other=-1)
        ties = ((logits == cut) & (at < size)).to(tl.int32)
        rank = seen + tl.cumsum(ties, 0)
        last = tl.maximum(last, tl.max(tl.where((ties == 1) & (rank <= num), tokens, -1), 0))
        seen += tl.sum(ties, 0)
        start += BLOCK
    return last
