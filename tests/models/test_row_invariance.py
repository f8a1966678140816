"""The start-up check of contract 1, on the BLAS at hand and on bad ones made for the test."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchwright.models import layers
from batchwright.models.layers import MIN_ROWS, Linear
from batchwright.models.row_invariance import ensure_row_invariance, rows_are_invariant

pytestmark = pytest.mark.cpu

real_linear = F.linear


def make_model(dtype=torch.float32):
    linears = [
        Linear(48, 97),
        Linear(48, 97),
        Linear(37, 48, bias=True),
        Linear(48, {"a": 5, "b": 8}),
    ]
    for linear in linears:
        for parameter in linear.parameters():
            parameter.normal_()
    return nn.ModuleList(linears).to(dtype)


def assert_rows_are_invariant(model):
    for linear in model:
        x = torch.randn(300, linear.weight.shape[1])
        together = linear(x)
        for size in (1, 5, 12, 63, 299):
            start = 300 - size
            assert torch.equal(linear(x[start:]), together[start:])
        torch.testing.assert_close(
            together, real_linear(x, linear.weight, linear.bias), rtol=1e-4, atol=1e-4
        )


def replace_linear(monkeypatch, fake):
    monkeypatch.setattr(layers.F, "linear", fake)


def test_this_blas(caplog):
    """Rows come out the same afterwards, or a warning says that they do not."""
    model = make_model()
    if ensure_row_invariance(model, 512):
        assert_rows_are_invariant(model)
    else:
        assert "by its place in the batch" in caplog.text


def other_rounding(x, weight, bias):
    """The same sums, in fp64: bits that a different kernel might give."""
    return real_linear(x.double(), weight.double(), None if bias is None else bias.double()).float()


def test_kernel_that_changes_with_few_rows_is_padded(monkeypatch, caplog):
    def linear(x, weight, bias=None):
        product = other_rounding if len(x) < 20 else real_linear
        return product(x, weight, bias)

    replace_linear(monkeypatch, linear)
    model = make_model()
    assert not rows_are_invariant(model[0], 256)
    assert ensure_row_invariance(model, 256)
    assert [(linear.min_rows, linear.tile_rows) for linear in model] == [(24, None)] * 4
    assert_rows_are_invariant(model)
    assert len(caplog.records) == 1
    assert "48x97, 37x48, 48x13" in caplog.text


def test_kernel_that_changes_with_every_size_is_tiled(monkeypatch, caplog):
    def linear(x, weight, bias=None):
        product = other_rounding if len(x) % 2 else real_linear
        return product(x, weight, bias)

    replace_linear(monkeypatch, linear)
    model = make_model()
    assert ensure_row_invariance(model, 256)
    assert all(linear.tile_rows == 64 for linear in model)
    assert_rows_are_invariant(model)
    assert len(caplog.records) == 1


def test_only_the_bad_shape_is_repaired(monkeypatch):
    def linear(x, weight, bias=None):
        product = other_rounding if len(x) % 2 and bias is not None else real_linear
        return product(x, weight, bias)

    replace_linear(monkeypatch, linear)
    model = make_model()
    assert ensure_row_invariance(model, 256)
    assert [linear.tile_rows for linear in model] == [None, None, 64, None]


def test_rows_that_depend_on_their_place_are_reported(monkeypatch, caplog):
    def linear(x, weight, bias=None):
        out = real_linear(x, weight, bias)
        out[1::3] = other_rounding(x[1::3], weight, bias)
        return out

    replace_linear(monkeypatch, linear)
    model = make_model()
    with caplog.at_level(logging.WARNING):
        assert not ensure_row_invariance(model, 256)
    assert "by its place in the batch" in caplog.text
    assert all((m.min_rows, m.tile_rows) == (MIN_ROWS, None) for m in model)


def test_bf16_promises_nothing():
    assert not ensure_row_invariance(make_model(torch.bfloat16), 256)
