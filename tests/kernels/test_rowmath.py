"""The arithmetic under the sampling kernels: keys that order, exp2, weights that sum exactly."""

from __future__ import annotations

import numpy as np
from numba import njit

from batchwright.kernels.sample import naive, rowmath

FINITE = np.array(
    [-3.4e38, -1e10, -2.5, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 0.3, 1.0, 2.0, 1e10, 3.4e38],
    np.float32,
)


@njit
def _keys(x: np.ndarray) -> list:
    return [rowmath.order_key(value) for value in x]


@njit
def _floats(keys: np.ndarray) -> list:
    return [rowmath.key_float(key) for key in keys]


@njit
def _exp2(y: np.ndarray) -> list:
    return [rowmath.exp2_32(value) for value in y]


@njit
def _weights(row: np.ndarray, top: float, inverse: float) -> list:
    return [rowmath.weight((value - top) * inverse) for value in row]


def test_keys_order_as_the_numbers_do() -> None:
    x = np.concatenate([[-np.inf], FINITE, [np.inf]]).astype(np.float32)
    keys = np.array(_keys(x))
    np.testing.assert_array_equal(np.diff(keys) > 0, np.diff(x) > 0)
    assert keys[0] == rowmath.MINUS_INF_KEY and keys[-1] == rowmath.PLUS_INF_KEY
    np.testing.assert_array_equal(np.array(_floats(keys.astype(np.int32)), np.float32), x)


def test_nans_of_both_signs_lie_outside_the_keys() -> None:
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    for key in _keys(nans):
        assert key < rowmath.MINUS_INF_KEY or key > rowmath.PLUS_INF_KEY


def test_exp2_is_accurate_and_exact_at_zero() -> None:
    y = np.concatenate([np.linspace(-125, 30, 200_001), [0.0, -1.0, -0.5]]).astype(np.float32)
    got = np.array(_exp2(y), np.float64)
    error = np.abs(got / np.exp2(y.astype(np.float64)) - 1)
    assert error.max() < 2e-7
    assert got[-3] == 1.0 and got[-2] == 0.5
    assert _exp2(np.array([-1000, -np.inf], np.float32)) == [2.0**-126] * 2


def test_weights_equal_the_naive_ones_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    for scale, temperature in ((1, 1.0), (10, 0.7), (1e4, 1e-8), (0.01, 50.0)):
        row = (scale * rng.standard_normal(20_000)).astype(np.float32)
        row[7] = -np.inf
        inverse = np.float32(np.log2(np.e) / temperature)
        fast = np.array(_weights(row, row.max(), inverse), np.float32)
        np.testing.assert_array_equal(fast, naive.weights(row, temperature))


def test_weights_are_close_and_add_up_exactly_in_any_order() -> None:
    rng = np.random.default_rng(1)
    row = (5 * rng.standard_normal(100_000)).astype(np.float32)
    weight = naive.weights(row, 1.0).astype(np.float64)
    exact = np.exp(row.astype(np.float64) - row.max())
    np.testing.assert_allclose(weight, exact, rtol=3e-6, atol=2.0**-35)
    np.testing.assert_array_equal(weight * 2**34, np.round(weight * 2**34))
    sums = {float(np.cumsum(rng.permutation(weight))[-1]) for _ in range(5)}
    assert len(sums) == 1


def test_plain_exponentials_do_not_add_up_exactly() -> None:
    """Negative control: this is what rounding to multiples of 2^-34 buys."""
    rng = np.random.default_rng(1)
    exact = np.exp(5 * rng.standard_normal(100_000) - 20)
    assert len({float(np.cumsum(rng.permutation(exact))[-1]) for _ in range(5)}) > 1


def test_what_has_no_weight_is_known_beforehand() -> None:
    assert _weights(np.array([rowmath.WEIGHTLESS], np.float32), np.float32(0), np.float32(1)) == [0]
    assert _weights(np.array([-34.9], np.float32), np.float32(0), np.float32(1))[0] > 0
