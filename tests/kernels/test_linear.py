"""Products with packed weights: against fp64, and bit-identity in every batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from batchwright import kernels
from batchwright.errors import ShapeError
from batchwright.kernels import parallel
from batchwright.kernels.linear import naive
from batchwright.kernels.linear import numba as kernel
from batchwright.kernels.linear.numba import DEPTH, TILE_ROWS, linear
from batchwright.kernels.linear.packing import (
    PANEL,
    PackedWeight,
    blank,
    pack,
    pack_blocks,
    packed_rows,
    unpack,
)
from batchwright.kernels.linear.panel_tile import BF16, FP16, FP32, INT4, INT8, fma_rows

pytestmark = pytest.mark.cpu

MOST = max(TILE_ROWS)
FORMS = ("fp32", "bf16", "fp16", "int8", "int4")
HALF = PANEL // 2
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
    multiply(x, pack(weight), bias, out)
    return out


def multiply(x: torch.Tensor, packed: PackedWeight, bias: np.ndarray, out: np.ndarray) -> None:
    linear(x.numpy(), packed.values.numpy(), packed.scales.numpy(), bias, out)


def narrow_weight(form: str, out_features: int, in_features: int, block: int = 32) -> PackedWeight:
    """A random weight of some form."""
    if not form.startswith("int"):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[form]
        return pack(numbers(out_features, in_features).to(dtype))
    generator = torch.Generator().manual_seed(0)
    low, high = (0, 16) if form == "int4" else (-128, 128)
    integers = torch.randint(low, high, (out_features, in_features), generator=generator)
    steps, lowest = (
        numbers(out_features, in_features // block, seed=seed).half().float() for seed in (1, 2)
    )
    return pack_blocks(integers.to(torch.int8), steps, lowest, int(form[3:]))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("in_features", [1, 7, 64, 577, DEPTH + 3])
@pytest.mark.parametrize("out_features", [1, 31, 32, 33, 96, 100])
def test_equals_fp64_twin(threads, in_features, out_features, with_bias) -> None:
    weight, bias = numbers(out_features, in_features), numbers(out_features, seed=1)
    for num_rows in (1, 2, MOST - 1, MOST, MOST + 1, 3 * MOST + 2):
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
        monkeypatch.setattr(parallel, "get_num_threads", lambda threads=threads: threads)
        np.testing.assert_array_equal(product(x, weight), alone)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("in_features", [32, 96, DEPTH + 64])
@pytest.mark.parametrize("form", FORMS)
def test_narrow_weights_give_the_bits_of_fp32(threads, form, in_features, block) -> None:
    packed = narrow_weight(form, 70, in_features, block)
    weight = unpack(packed, 70)
    for num_rows in (1, 3, MOST, MOST + 1, 8 * MOST + 3):
        x = numbers(num_rows, in_features, seed=num_rows)
        out = np.full((num_rows, 70), np.nan, np.float32)
        multiply(x, packed, NO_BIAS, out)
        np.testing.assert_array_equal(out, product(x, weight))


@pytest.mark.parametrize("name", FORMS)
def test_halves_of_a_panel_give_the_same(name) -> None:
    """As processors with narrow registers take them, whatever this one has."""
    form = (FP32, BF16, FP16, INT8, INT4)[FORMS.index(name)]
    packed = narrow_weight(name, PANEL, 64)
    values, scales = packed.values.numpy(), packed.scales.numpy()
    if name == "fp16":
        values = values.view(np.uint16)
    x, halves = numbers(3, 64).numpy(), np.full((3, PANEL), np.nan, np.float32)

    @njit
    def run(x, values, scales, out):  # type: ignore[no-untyped-def]
        for column in (0, HALF):
            fma_rows(
                form, 3, HALF, False, x, 0, 64,
                values, 0, column, scales, 5, out, column, PANEL, 64, 3,
            )  # fmt: skip

    run(x, values, scales, halves)
    np.testing.assert_array_equal(halves, product(torch.from_numpy(x), unpack(packed, PANEL)))


def test_packing_keeps_the_bits_of_every_16_bit_number() -> None:
    """Infinities and subnormal numbers too; a NaN stays one."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(256, 256)
    for dtype in (torch.bfloat16, torch.float16):
        weight = bits.view(dtype)
        packed = pack(weight)
        np.testing.assert_array_equal(unpack(packed, 256).numpy(), weight.float().numpy())
        for k in range(0, 256, 51):  # and the kernel widens them alike
            x, out = torch.zeros(1, 256), np.empty((1, 256), np.float32)
            x[0, k] = 1.0
            finite = torch.where(weight.isfinite(), weight, 0.0)
            multiply(x, pack(finite), NO_BIAS, out)
            np.testing.assert_array_equal(out[0], finite[:, k].float().numpy())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("out_features", [1, 32, 70])
def test_packing_keeps_every_weight(form, out_features) -> None:
    packed = narrow_weight(form, out_features, 64)
    width = PANEL // 2 if form == "int4" else PANEL
    assert packed.values.shape == (-(-out_features // PANEL), 64, width)
    if form == "fp32":
        assert torch.equal(unpack(packed, out_features), numbers(out_features, 64))
    ids = torch.arange(out_features).flip(0)
    assert torch.equal(packed_rows(packed, ids), unpack(packed, out_features)[ids])


def test_integers_are_scaled_by_their_block() -> None:
    for bits, low, high in ((4, 0, 16), (8, -128, 128)):
        integers = torch.randint(low, high, (40, 64), dtype=torch.int8)
        steps, lowest = numbers(40, 2), numbers(40, 2, seed=1)
        right = integers.float() * steps.repeat_interleave(32, 1)
        found = unpack(pack_blocks(integers, steps, None, bits), 40)
        assert torch.equal(found, right)
        found = unpack(pack_blocks(integers, steps, lowest, bits), 40)
        assert torch.equal(found, right + lowest.repeat_interleave(32, 1))


@pytest.mark.parametrize("form", FORMS)
def test_blank_weights_are_laid_out_like_others(form) -> None:
    packed, like = blank(70, 96, form), narrow_weight(form, 70, 96)
    assert packed.values.shape == like.values.shape
    assert packed.values.dtype == like.values.dtype
    assert packed.scales.shape == like.scales.shape
    assert packed.nbytes == like.nbytes


@pytest.mark.parametrize(
    ("x", "values", "scales", "bias", "out"),
    [
        ((3, 8), (2, 9, 32), (0, 0, 2, 32), (0,), (3, 64)),
        ((3, 8), (2, 8, 32), (0, 0, 2, 32), (0,), (3, 65)),
        ((3, 8), (2, 8, 32), (0, 0, 2, 32), (1,), (3, 64)),
        ((3, 8), (2, 8, 16), (0, 0, 2, 32), (0,), (3, 64)),
        ((2, 8), (2, 8, 32), (0, 0, 2, 32), (0,), (3, 64)),
    ],
)
def test_refuses_shapes_that_disagree(x, values, scales, bias, out) -> None:
    with pytest.raises(ShapeError, match="disagree"):
        linear(*(np.zeros(shape, np.float32) for shape in (x, values, scales, bias, out)))


@pytest.mark.parametrize("scales", [(0, 0, 2, 32), (1, 2, 2, 32), (2, 3, 2, 32), (2, 2, 1, 32)])
def test_refuses_scales_that_disagree(scales) -> None:
    x, values, out = np.zeros((3, 64)), np.zeros((2, 64, 32), np.int8), np.zeros((3, 64))
    with pytest.raises(ShapeError, match="disagree"):
        linear(x, values, np.zeros(scales, np.float32), NO_BIAS, out)


def test_refuses_what_is_not_contiguous() -> None:
    x, scales = np.zeros((8, 6), np.float32), np.empty((0, 0, 2, PANEL), np.float32)
    values, out = np.zeros((1, 3, 32), np.float32), np.zeros((8, 32), np.float32)
    with pytest.raises(ShapeError, match="contiguous"):
        linear(x[:, ::2], values, scales, NO_BIAS, out)
