"""Norms and activations against torch, in every dtype, and row by row bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from batchwright.models import functional

pytestmark = pytest.mark.cpu

WIDTHS = [3, 8, 40, 50, 97, 192]


def gate_of(gated):
    """A gated activation as a function of the gate alone."""
    return lambda x: gated(torch.cat((x, torch.ones_like(x)), dim=-1))


REFERENCES = {
    "gelu": (functional.gelu, F.gelu),
    "gelu_tanh": (functional.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "relu": (functional.relu, F.relu),
    "silu_and_mul": (gate_of(functional.silu_and_mul), F.silu),
    "gelu_tanh_and_mul": (
        gate_of(functional.gelu_tanh_and_mul),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "soft_cap": (lambda x: functional.soft_cap(x.clone(), 5.0), lambda x: 5 * torch.tanh(x / 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REFERENCES)
def test_equals_torch(name, dtype):
    ours, theirs = REFERENCES[name]
    x = (4 * torch.randn(37, 50)).to(dtype)
    x[0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e-20, -88.5])
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(ours(x), theirs(x), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_are_not_swapped(dtype):
    gate, up = torch.randn(2, 5, 7).to(dtype)
    merged = torch.cat((gate, up), dim=-1)
    torch.testing.assert_close(functional.silu_and_mul(merged), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torch(dtype):
    x, weight = torch.randn(9, 3, 50).to(dtype), torch.randn(50).to(dtype)
    expected = F.rms_norm(x.float(), (50,), weight.float(), 1e-6).to(dtype)
    view = torch.cat((x, x), dim=-1)[..., :50]  # rows apart, as the heads of a merged product
    for same in (x, view):
        torch.testing.assert_close(functional.rms_norm(same, weight, 1e-6), expected)
    shifted = functional.rms_norm(x, weight - 1, 1e-6, unit_offset=True)
    # weight - 1 is rounded where weight was not: a few units in the last place
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(shifted, expected, rtol=tolerance, atol=tolerance)


def norm(x):
    return functional.rms_norm(x, torch.linspace(0.5, 1.5, x.shape[-1]).to(x.dtype), 1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*REFERENCES, "rms_norm"])
def test_rows_have_the_same_bits_in_any_batch(name, dtype, width):
    ours = norm if name == "rms_norm" else REFERENCES[name][0]
    x = (3 * torch.randn(700, width)).to(dtype)
    together = ours(x)
    for size in (1, 2, 3, 7, 12, 31, 100, 333):
        for start in (0, 5, 700 - size):
            rows = slice(start, start + size)
            assert torch.equal(ours(x[rows]), together[rows])


def test_torch_itself_would_not_pass():
    """The control: were silu bitwise row by row, there would be no reason to compose it."""
    x = torch.randn(700, 40)
    together = F.silu(x)
    assert any(not torch.equal(F.silu(x[:size]), together[:size]) for size in (1, 7, 31, 33))
