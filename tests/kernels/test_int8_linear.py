"""int8 products: against exact integer sums in every way of multiplying, and bit-identity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llvmlite.binding import get_host_cpu_features

from batchwright import kernels
from batchwright.errors import ShapeError
from batchwright.kernels import parallel
from batchwright.kernels.int8_linear import naive
from batchwright.kernels.int8_linear import numba as kernel
from batchwright.kernels.int8_linear.dot_tile import (
    PAIRS_256,
    PAIRS_512,
    PLAIN,
    VNNI_256,
    VNNI_512,
    WAYS,
    best_way,
)
from batchwright.kernels.int8_linear.numba import int8_linear
from batchwright.kernels.int8_linear.packing import BLOCK, PANEL, pack, quantize_weight, unpack

pytestmark = pytest.mark.cpu


def possible_ways() -> list[int]:
    """Those that this processor can run: all of them with AVX-512 VNNI."""
    features = get_host_cpu_features()
    needs = {VNNI_512: "avx512vnni", VNNI_256: "avxvnni", PAIRS_512: "avx512bw", PAIRS_256: "avx2"}
    return [way for way in WAYS if features.get(needs.get(way, ""), way == PLAIN)]


@pytest.fixture(params=possible_ways())
def way(request) -> int:
    return request.param


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


def product(x, weight, way, bias=None) -> np.ndarray:
    values, scales = quantize_weight(weight)
    packed = pack(values, scales)
    channels = np.zeros((2, len(packed.scales)), np.float32)
    channels[0] = packed.scales
    if bias is not None:
        channels[1, : len(bias)] = bias
    out = np.full((len(x), len(weight)), np.nan, np.float32)
    int8_linear(x.numpy(), packed.values.numpy(), channels, out, way)
    return out


@pytest.mark.parametrize("in_features", [1, 7, BLOCK, BLOCK + 1, 577, 2051])
@pytest.mark.parametrize("out_features", [1, 32, 33, 96, 100])
def test_equals_twin(way, threads, in_features, out_features) -> None:
    weight, bias = numbers(out_features, in_features), numbers(out_features, seed=1)
    rows = WAYS[way].rows
    for num_rows in (1, 2, rows - 1, rows, rows + 1, 3 * rows + 2):
        x = numbers(num_rows, in_features, seed=num_rows)
        right = naive.int8_linear(x, *quantize_weight(weight), bias, bits=WAYS[way].bits)
        np.testing.assert_array_equal(product(x, weight, way, bias.numpy()), right.numpy())


@pytest.mark.parametrize("sign_x", [1, -1])
@pytest.mark.parametrize("sign_w", [1, -1])
def test_same_sign_rows_do_not_saturate(way, sign_x, sign_w) -> None:
    """All at their largest: sums of byte pairs are as far from zero as they get."""
    x = torch.full((5, 4 * BLOCK), 3.0 * sign_x)
    weight = torch.full((PANEL, 4 * BLOCK), 0.5 * sign_w)
    levels = WAYS[way].levels
    scale = np.float32(3.0 / levels) * np.float32(0.5 / 127)
    right = sign_x * sign_w * levels * 127 * 4 * BLOCK * scale
    np.testing.assert_allclose(product(x, weight, way), right, rtol=1e-6)


def test_outliers_equal_the_exact_integer_sum(way) -> None:
    weight, x = numbers(64, 577).abs(), numbers(40, 577, seed=1).abs()
    x[:, 100] *= 1000
    x[::3, 300] *= -500
    weight[:, 7] *= 100
    values, scales = quantize_weight(weight)
    right = naive.int8_linear(x, values, scales, bits=WAYS[way].bits)
    np.testing.assert_array_equal(product(x, weight, way), right.numpy())
    assert np.abs(product(x, weight, way)).max() > 1000


def test_is_near_the_fp32_product(way) -> None:
    weight, x = numbers(96, 576), numbers(64, 576, seed=1)
    right = (x @ weight.T).numpy()
    error = np.linalg.norm(product(x, weight, way) - right) / np.linalg.norm(right)
    assert error < {8: 0.012, 7: 0.02}[WAYS[way].bits]


def test_a_row_has_the_same_bits_in_every_batch(way, threads) -> None:
    weight, x = numbers(129, 577), numbers(301, 577, seed=1)
    together = product(x, weight, way)
    for size in [*range(1, 40), 128, 300]:
        rows = torch.randperm(301, generator=torch.Generator().manual_seed(size))[:size]
        np.testing.assert_array_equal(product(x[rows], weight, way), together[rows.numpy()])


def test_bits_do_not_depend_on_threads(monkeypatch) -> None:
    weight, x = numbers(64, 200), numbers(170, 200, seed=1)
    way = best_way()
    alone = product(x, weight, way)
    monkeypatch.setattr(kernel, "_MACS_PER_THREAD", 1)
    for threads in (1, 2, 3, 5, 8):
        monkeypatch.setattr(parallel, "get_num_threads", lambda threads=threads: threads)
        for _ in range(20):
            np.testing.assert_array_equal(product(x, weight, way), alone)


def test_8_bit_ways_have_the_same_bits() -> None:
    weight, x = numbers(70, 300), numbers(33, 300, seed=1)
    found = [product(x, weight, way) for way in possible_ways() if WAYS[way].bits == 8]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(way, value) -> None:
    weight, x = numbers(40, 300), numbers(9, 300, seed=1)
    right = product(x, weight, way)
    for column in (0, 150, 299):
        bad = x.clone()
        bad[4, column] = value
        found = product(bad, weight, way)
        assert np.isnan(found[4]).all()
        np.testing.assert_array_equal(np.delete(found, 4, 0), np.delete(right, 4, 0))


def test_zeros_and_tiny_rows_become_the_bias(way) -> None:
    x = torch.zeros(3, 100)
    x[1], x[2] = 1e-38, 1e-42
    bias = numbers(40).numpy()
    found = product(x, numbers(40, 100), way, bias)
    np.testing.assert_array_equal(found, np.broadcast_to(bias, (3, 40)))
    assert not product(numbers(2, 100), torch.zeros(40, 100), way).any()


@pytest.mark.parametrize("out_features", [1, 32, 70])
def test_packing_keeps_every_value(out_features) -> None:
    values, scales = quantize_weight(numbers(out_features, 9))
    assert values.abs().amax(dim=1).eq(127).all()
    packed = pack(values, scales)
    assert torch.equal(unpack(packed, out_features, 9), values)
    assert torch.equal(packed.scales[:out_features], scales)


@pytest.mark.parametrize(
    ("x", "values", "channels", "out"),
    [
        ((3, 8), (2, 3, 32, 4), (2, 64), (3, 64)),
        ((3, 8), (2, 2, 32, 4), (2, 64), (3, 65)),
        ((3, 8), (2, 2, 32, 4), (2, 63), (3, 64)),
        ((2, 8), (2, 2, 32, 4), (2, 64), (3, 64)),
    ],
)
def test_refuses_shapes_that_disagree(x, values, channels, out) -> None:
    arrays = np.zeros(x, np.float32), np.zeros(values, np.uint8), np.zeros(channels, np.float32)
    with pytest.raises(ShapeError, match="disagree"):
        int8_linear(*arrays, np.zeros(out, np.float32))


def test_refuses_what_is_not_contiguous() -> None:
    x, out = np.zeros((8, 8), np.float32), np.zeros((8, 32), np.float32)
    values = np.zeros((1, 1, 32, 4), np.uint8)
    with pytest.raises(ShapeError, match="contiguous"):
        int8_linear(x[:, ::2], values, np.zeros((2, 32), np.float32), out)
