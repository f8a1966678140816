"""Products with packed weights: against fp64, and bit-identity in every batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchwright import kernels
from batchwright.errors import ShapeError
from batchwright.kernels.linear import naive
from batchwright.kernels.linear import numba as kernel
from batchwright.kernels.linear.numba import DEPTH, TILE_ROWS, linear
from batchwright.kernels.linear.packing import PANEL, pack, packed_rows, unpack

pytestmark = pytest.mark.cpu

NO_BIAS = np.empty(0, np.float32)


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """One thread, or two for any amount of work."""
    monkeypatch.setattr(kernel, "_MACS_PER_THREAD", 1)
    before = kernels.get_num_threads()
    kernels.set_num_threads(request.param)
    yield
    kernels.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(x: torch.Tensor, weight: torch.Tensor, bias: np.ndarray = NO_BIAS) -> np.ndarray:
    out = np.full((len(x), len(weight)), np.nan, np.float32)
    linear(x.numpy(), pack(weight).numpy(), bias, out)
    return out


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("in_features", [1, 7, 64, 577, DEPTH + 3])
@pytest.mark.parametrize("out_features", [1, 31, 32, 33, 96, 100])
def test_equals_fp64_twin(threads, in_features, out_features, with_bias) -> None:
    weight, bias = numbers(out_features, in_features), numbers(out_features, seed=1)
    for num_rows in (1, 2, TILE_ROWS - 1, TILE_ROWS, TILE_ROWS + 1, 3 * TILE_ROWS + 2):
        x = numbers(num_rows, in_features, seed=num_rows)
        right = naive.linear(x.double(), weight.double(), bias.double() if with_bias else None)
        found = product(x, weight, bias.numpy() if with_bias else NO_BIAS)
        # A chain of roundings, each of half an ulp of a sum that grows like a random walk.
        np.testing.assert_allclose(found, right.numpy(), rtol=0, atol=1e-6 * in_features**0.75)


def test_a_row_has_the_same_bits_in_every_batch(threads) -> None:
    weight, x = numbers(129, 577), numbers(301, 577, seed=1)
    together = product(x, weight)
    for size in [*range(1, 60), 128, 300]:
        rows = torch.randperm(301, generator=torch.Generator().manual_seed(size))[:size]
        np.testing.assert_array_equal(product(x[rows], weight), together[rows.numpy()])


def test_sums_are_one_chain_in_the_order_of_the_inputs() -> None:
    """What every processor must give: multiply-adds rounded once, the first input first."""
    weight, x = numbers(33, 300), numbers(5, 300, seed=1)
    chain = np.zeros((5, 33))
    for k in range(300):  # fp64 holds a product of fp32 exactly, and the sum rounds nearly once
        step = np.outer(x[:, k].double().numpy(), weight[:, k].double().numpy()) + chain
        chain = step.astype(np.float32).astype(np.float64)
    found = product(x, weight)
    assert (found == chain.astype(np.float32)).mean() > 0.999  # fp64 rounds twice, very rarely


def test_bits_do_not_depend_on_threads(monkeypatch) -> None:
    weight, x = numbers(64, 200), numbers(70, 200, seed=1)
    alone = product(x, weight)
    monkeypatch.setattr(kernel, "_MACS_PER_THREAD", 1)
    for threads in (1, 2, 3, 5, 8):
        monkeypatch.setattr(kernel, "get_num_threads", lambda threads=threads: threads)
        np.testing.assert_array_equal(product(x, weight), alone)


@pytest.mark.parametrize("out_features", [1, 32, 70])
def test_packing_keeps_every_weight(out_features) -> None:
    weight = numbers(out_features, 9)
    packed = pack(weight)
    assert packed.shape == (-(-out_features // PANEL), 9, PANEL)
    assert torch.equal(unpack(packed, out_features), weight)
    ids = torch.arange(out_features).flip(0)
    assert torch.equal(packed_rows(packed, ids), weight[ids])


@pytest.mark.parametrize(
    ("x", "packed", "bias", "out"),
    [
        ((3, 8), (2, 9, 32), (0,), (3, 64)),
        ((3, 8), (2, 8, 32), (0,), (3, 65)),
        ((3, 8), (2, 8, 32), (1,), (3, 64)),
        ((3, 8), (2, 8, 16), (0,), (3, 64)),
        ((2, 8), (2, 8, 32), (0,), (3, 64)),
    ],
)
def test_refuses_shapes_that_disagree(x, packed, bias, out) -> None:
    with pytest.raises(ShapeError, match="disagree"):
        linear(*(np.zeros(shape, np.float32) for shape in (x, packed, bias, out)))


def test_refuses_what_is_not_contiguous() -> None:
    x = np.zeros((8, 6), np.float32)
    with pytest.raises(ShapeError, match="contiguous"):
        linear(x[:, ::2], np.zeros((1, 3, 32), np.float32), NO_BIAS, np.zeros((8, 32), np.float32))
