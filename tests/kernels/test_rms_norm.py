"""RMS norm: against its fp64 twin and transformers' class, and bit-identity in every batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchwright import kernels
from batchwright.errors import ShapeError
from batchwright.kernels.rms_norm import naive
from batchwright.kernels.rms_norm import numba as kernel
from batchwright.kernels.rms_norm.numba import rms_norm

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def parallel_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_ELEMENTS_PER_THREAD", 1)


RELATIVE = 1e-6  # eight roundings of fp32 at most; a sum of squares has no cancellation


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("hidden", [1, 7, 8, 31, 32, 37, 64, 576, 1001])
def test_equals_fp64_twin(hidden: int, with_residual: bool, unit_offset: bool) -> None:
    x, weight = normal(13, hidden), normal(hidden, seed=1)
    residual = normal(13, hidden, seed=2) if with_residual else None
    right, total = naive.rms_norm(
        torch.from_numpy(x).double(),
        torch.from_numpy(weight).double(),
        1e-5,
        residual=None if residual is None else torch.from_numpy(residual).double(),
        unit_offset=unit_offset,
    )
    out = np.full_like(x, np.nan)
    kept = x.copy()
    rms_norm(x, weight, 1e-5, out, residual=residual, unit_offset=unit_offset)
    np.testing.assert_allclose(out, right.numpy(), rtol=RELATIVE, atol=1e-6)
    np.testing.assert_array_equal(x, kept)
    if residual is not None:
        np.testing.assert_array_equal(residual, x + normal(13, hidden, seed=2))
        np.testing.assert_allclose(residual, total.numpy(), atol=1e-6)


def test_equals_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(576, eps=1e-5)
    x, weight = normal(33, 576), normal(576, seed=1)
    module.weight.data = torch.from_numpy(weight)
    out = np.full_like(x, np.nan)
    rms_norm(x, weight, 1e-5, out)
    expected = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(out, expected, rtol=RELATIVE, atol=1e-7)
    wrong = np.full_like(x, np.nan)
    rms_norm(x, weight, 1e-3, wrong)  # negative control
    assert np.abs(wrong - expected).max() > 1e-4


def test_in_place_on_a_view_of_heads() -> None:
    merged, weight = normal(9, 5 * 24), normal(24, seed=1)
    heads = merged[:, 24:96].reshape(9, 3, 24)
    expected, _ = naive.rms_norm(
        torch.from_numpy(heads.copy()).double(), torch.from_numpy(weight).double(), 1e-6
    )
    before = merged.copy()
    rms_norm(heads, weight, 1e-6, heads)
    np.testing.assert_allclose(heads, expected.numpy(), rtol=RELATIVE, atol=1e-6)
    np.testing.assert_array_equal(merged[:, :24], before[:, :24])
    np.testing.assert_array_equal(merged[:, 96:], before[:, 96:])


@pytest.mark.parametrize("hidden", [37, 576])
def test_batch_and_threads_change_no_bit(hidden: int) -> None:
    x, weight = normal(150, hidden), normal(hidden, seed=1)
    whole = np.full_like(x, np.nan)
    rms_norm(x, weight, 1e-5, whole)
    before = kernels.get_num_threads()
    kernels.set_num_threads(1)
    one_thread = np.full_like(x, np.nan)
    rms_norm(x, weight, 1e-5, one_thread)
    kernels.set_num_threads(before)
    np.testing.assert_array_equal(whole, one_thread)
    for size in (1, 7, 32):
        pieces = np.full_like(x, np.nan)
        for a in range(0, 150, size):
            rms_norm(x[a : a + size], weight, 1e-5, pieces[a : a + size])
        np.testing.assert_array_equal(whole, pieces)


def test_bad_arrays_are_refused() -> None:
    x, weight = normal(4, 8), normal(8)
    with pytest.raises(ShapeError, match="disagree"):
        rms_norm(x, weight[:7], 1e-5, x.copy())
    with pytest.raises(ShapeError, match="disagree"):
        rms_norm(x, weight, 1e-5, x[:3].copy())
    with pytest.raises(ShapeError, match="contiguous"):
        rms_norm(normal(8, 4).T, weight, 1e-5, x.copy())
