"""Activations: against their fp64 twins and torch in fp32, and bit-identity in every batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchwright import kernels
from batchwright.errors import ConfigError, ShapeError
from batchwright.kernels.gated_activation import naive
from batchwright.kernels.gated_activation import numba as kernel
from batchwright.kernels.gated_activation.numba import KINDS, activation, gated_activation

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def parallel_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_ELEMENTS_PER_THREAD", 1)


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, 8, 40, 203, 1536])
@pytest.mark.parametrize("kind", KINDS)
def test_gated_equals_fp64_twin(kind: str, size: int) -> None:
    x = normal(11, 2 * size)
    out = np.full((11, size), np.nan, np.float32)
    gated_activation(x, kind, out)
    right = naive.gated_activation(torch.from_numpy(x).double(), kind).numpy()
    # gelu's tail is 1 + erf with erf near -1: an error of one ulp of 1, times x * up
    np.testing.assert_allclose(out, right, rtol=6e-7, atol=3e-6 if "gelu" in kind else 1e-30)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_equals_torch(kind: str) -> None:
    x = normal(11, 203)
    out = np.full_like(x, np.nan)
    activation(x, kind, out)
    expected = naive.activation(torch.from_numpy(x), kind).numpy()
    np.testing.assert_allclose(out, expected, rtol=6e-7, atol=1e-6 if "gelu" in kind else 0)


def test_kinds_differ() -> None:
    """Negative control: the two gelus and silu are told apart at the tolerances used."""
    x = normal(11, 203)
    results = {kind: np.empty_like(x) for kind in KINDS}
    for kind, out in results.items():
        activation(x, kind, out)
    assert np.abs(results["gelu"] - results["gelu_tanh"]).max() > 1e-4
    assert np.abs(results["gelu"] - results["silu"]).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_far_and_special_values(kind: str) -> None:
    x = np.array([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, np.nan, np.inf]], np.float32)
    out = np.full_like(x, np.inf)
    activation(x, kind, out)
    assert np.abs(out[0, :3]).max() < 1e-30
    np.testing.assert_array_equal(out[0, 3:7], x[0, 3:7])
    assert np.isnan(out[0, 7]) and out[0, 8] == np.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [37, 256])
def test_batch_and_threads_change_no_bit(kind: str, size: int) -> None:
    x = normal(150, 2 * size)
    whole = np.full((150, size), np.nan, np.float32)
    gated_activation(x, kind, whole)
    before = kernels.get_num_threads()
    kernels.set_num_threads(1)
    one_thread = np.full_like(whole, np.nan)
    gated_activation(x, kind, one_thread)
    kernels.set_num_threads(before)
    np.testing.assert_array_equal(whole, one_thread)
    for rows in (1, 7, 32):
        pieces = np.full_like(whole, np.nan)
        for a in range(0, 150, rows):
            gated_activation(x[a : a + rows], kind, pieces[a : a + rows])
        np.testing.assert_array_equal(whole, pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_does_not_depend_on_its_place(kind: str) -> None:
    """The masked tail of a row gives the bits of the vector body."""
    x = normal(1, 64)
    out, tail = np.empty_like(x), np.empty((1, 5), np.float32)
    activation(x, kind, out)
    activation(x[:, 19:24], kind, tail)
    np.testing.assert_array_equal(out[:, 19:24], tail)


def test_bad_arguments_are_refused() -> None:
    x = normal(4, 16)
    with pytest.raises(ConfigError, match="supported: silu"):
        activation(x, "swish", x.copy())
    with pytest.raises(ShapeError, match="twice"):
        gated_activation(x, "silu", np.empty((4, 16), np.float32))
    with pytest.raises(ShapeError, match="contiguous"):
        activation(x.T, "silu", np.empty((16, 4), np.float32))
