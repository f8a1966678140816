"""The vector functions against numpy in fp64: error bounds, edges, and lanes that agree."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numba import njit

import batchwright.kernels  # noqa: F401
from batchwright.kernels.simd import (
    horizontal_max,
    horizontal_sum,
    load,
    load_first,
    load_many,
    store,
    store_first,
)
from batchwright.kernels.simd_math import erf, exp, exp2, tanh


@njit(cache=True)
def _map(kind: int, x: np.ndarray, out: np.ndarray) -> None:
    for i in range(0, len(x), 8):
        v = load(x, i)
        if kind == 0:
            v = exp2(v)
        elif kind == 1:
            v = exp(v)
        elif kind == 2:
            v = tanh(v)
        else:
            v = erf(v)
        store(out, i, v)


@njit(cache=True)
def _map_many(x: np.ndarray, out: np.ndarray) -> None:
    """All functions, of 32 lanes at a time, one after the other."""
    for i in range(0, len(x), 32):
        v = load_many(x, i)
        store(out, i, exp2(v))
        store(out, len(x) + i, exp(v))
        store(out, 2 * len(x) + i, tanh(v))
        store(out, 3 * len(x) + i, erf(v))


@njit(cache=True)
def _reduce(x: np.ndarray) -> tuple[float, float]:
    return horizontal_sum(load(x, 0)), horizontal_max(load(x, 0))


@njit(cache=True)
def _copy_first(x: np.ndarray, start: int, count: int, out: np.ndarray) -> None:
    store_first(out, start, count, load_first(x, start, count))


def apply(kind: int, x: np.ndarray) -> np.ndarray:
    out = np.full_like(x, np.nan)
    _map(kind, x, out)
    return out


def in_ulp(value: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(value.astype(np.float64) - exact) / np.spacing(exact.astype(np.float32))


@pytest.mark.parametrize(
    "kind, function, low, high, bound",
    [
        (0, np.exp2, -126.4, 127.4, 1.5),
        (1, np.exp, -87.3, 88.3, 2.0),
        (2, np.tanh, -12.0, 12.0, 3.0),
        (3, np.vectorize(math.erf), -5.0, 5.0, 3.0),
    ],
    ids=["exp2", "exp", "tanh", "erf"],
)
def test_error_bound(kind: int, function: Callable, low: float, high: float, bound: float) -> None:
    rng = np.random.default_rng(0)
    wide = rng.uniform(low, high, 60000)
    near_zero = rng.standard_normal(20000) * 10.0 ** rng.uniform(-6, 0, 20000)
    x = np.concatenate([wide, near_zero]).astype(np.float32)
    exact = function(x.astype(np.float64))
    assert in_ulp(apply(kind, x), exact).max() < bound


def test_edges() -> None:
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -1e30, 0.0, -0.0, 3.0, nan, inf, 1e30], np.float32)
    two, e, th, er = (apply(kind, x) for kind in range(4))
    np.testing.assert_array_equal(two[:5], [0, 0, 1, 1, 8])
    np.testing.assert_array_equal(e[:4], [0, 0, 1, 1])
    for y in (two, e):
        assert np.isnan(y[5]) and np.isfinite(y[6:]).all() and (y[6:] > 1e38).all()
    for y in (th, er):
        np.testing.assert_array_equal(y[[0, 1, 2, 6, 7]], [-1, -1, 0, 1, 1])
        assert np.signbit(y[3]) and np.isnan(y[5])


def test_exp2_is_exact_at_integers() -> None:
    n = np.arange(-126, 122, dtype=np.float32)
    np.testing.assert_array_equal(apply(0, n), np.exp2(n.astype(np.float64)))


def test_many_lanes_have_the_bits_of_few() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(6400) * 10.0 ** rng.uniform(-6, 2, 6400)).astype(np.float32)
    x[:3] = np.inf, -np.inf, np.nan
    many = np.full(4 * len(x), np.nan, np.float32)
    _map_many(x, many)
    few = np.concatenate([apply(kind, x) for kind in range(4)])
    np.testing.assert_array_equal(many.view(np.int32), few.view(np.int32))


def test_horizontal_reductions() -> None:
    x = np.array([1, -5, 3, 1e8, 9, -1e8, 2, 0], np.float32)
    total, largest = _reduce(x)
    assert largest == np.float32(1e8)
    lanes = [np.float32(x[i] + x[i + 4]) for i in range(4)]
    assert total == (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


@pytest.mark.parametrize("count", range(9))
def test_masked_memory_is_not_touched(count: int) -> None:
    x, out = np.arange(24, dtype=np.float32), np.full(24, -1, np.float32)
    _copy_first(x, 8, count, out)
    expected = np.full(24, -1, np.float32)
    expected[8 : 8 + count] = x[8 : 8 + count]
    np.testing.assert_array_equal(out, expected)
