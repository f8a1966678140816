"""exp, exp2, tanh and erf of fp32 lanes, for Numba kernels.

Polynomials and exact scaling only: no table, no branch, the same operations for every argument, so
the same bits wherever a number stands. tests/kernels/test_simd.py checks the bounds on the error.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from batchwright.kernels.simd import (
    absolute,
    add,
    copy_sign,
    div,
    fma,
    mul,
    power_of_two,
    sub,
    where_less,
)


@njit(forceinline=True)
def _exp2_fraction(f: Any) -> Any:
    """2**f for -0.5 <= f <= 0.5: relative minimax polynomial (2.6e-9), exactly 1 at 0."""
    p = 1.55946775070199550e-4
    p = fma(p, f, 1.34066439036309784e-3)
    p = fma(p, f, 9.61769297502501966e-3)
    p = fma(p, f, 5.55031055100012050e-2)
    p = fma(p, f, 2.40226527828752007e-1)
    p = fma(p, f, 6.93147214968037217e-1)
    p = fma(p, f, 1.0)
    return p


@njit(forceinline=True)
def exp2(x: Any) -> Any:
    """2**x: within 1.5 ulp for -126.5 < x < 127.5; 0 below, 2**127.5 above; exact at integers.

    NaN stays NaN.
    """
    x = where_less(x, -127.0, -127.0, x)
    x = where_less(127.49, x, 127.49, x)
    magic = 12582912.0
    shifted = add(x, magic)
    f = sub(x, sub(shifted, magic))
    return mul(_exp2_fraction(f), power_of_two(shifted))


@njit(forceinline=True)
def exp(x: Any) -> Any:
    """e**x: within 2 ulp for -87 < x < 88; 0 below -88, 2**127.5 above. NaN stays NaN."""
    x = where_less(x, -88.03, -88.03, x)
    x = where_less(88.37, x, 88.37, x)
    magic = 12582912.0
    shifted = fma(x, 1.4426950408889634, magic)
    n = sub(shifted, magic)
    # ln 2 in two parts keeps the remainder exact where x * log2(e) would lose its last bits.
    remainder = fma(n, -0.693359375, x)
    remainder = fma(n, 2.12194440054690583e-4, remainder)
    return mul(_exp2_fraction(mul(remainder, 1.4426950408889634)), power_of_two(shifted))


@njit(forceinline=True)
def tanh(x: Any) -> Any:
    """tanh(x) within 3 ulp. NaN stays NaN.

    Below 0.625 an odd polynomial, above it 1 - 2 / (exp(2x) + 1), which would cancel near zero.
    """
    size = absolute(x)
    e = exp(mul(size, 2.0))
    large = sub(1.0, div(2.0, add(e, 1.0)))
    square = mul(x, x)
    p = -5.70498872745e-3
    p = fma(p, square, 2.06390887954e-2)
    p = fma(p, square, -5.37397155531e-2)
    p = fma(p, square, 1.33314422036e-1)
    p = fma(p, square, -3.33332819422e-1)
    small = fma(mul(p, square), size, size)
    return copy_sign(where_less(size, 0.625, small, large), x)


@njit(forceinline=True)
def erf(x: Any) -> Any:
    """erf(x) within 3 ulp. NaN stays NaN.

    Up to 1 an odd polynomial, above it 1 - 2**-p(x) with a polynomial p; both Chebyshev fits.
    """
    size = absolute(x)
    square = mul(x, x)
    p = 7.882497113884e-05
    p = fma(p, square, -8.018854993792e-04)
    p = fma(p, square, 5.189311942771e-03)
    p = fma(p, square, -2.685432879608e-02)
    p = fma(p, square, 1.128359746349e-01)
    p = fma(p, square, -3.761262690358e-01)
    p = fma(p, square, 1.128379165882e00)
    small = mul(p, size)
    bounded = where_less(4.0, size, 4.0, size)
    p = -2.328598700737e-06
    p = fma(p, bounded, 6.577336557481e-05)
    p = fma(p, bounded, -8.551856787745e-04)
    p = fma(p, bounded, 6.838695296902e-03)
    p = fma(p, bounded, -3.803624709419e-02)
    p = fma(p, bounded, 1.586650690461e-01)
    p = fma(p, bounded, 9.116925109603e-01)
    p = fma(p, bounded, 1.630485858281e00)
    p = fma(p, bounded, -4.374438878596e-04)
    large = sub(1.0, exp2(sub(0.0, p)))
    return copy_sign(where_less(size, 1.0, small, large), x)
