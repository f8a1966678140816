"""ModelShape against the parameters and the arithmetic of real models."""

from __future__ import annotations

import json

import pytest
import torch

from batchwright.models.layers import Linear
from batchwright.models.shape import read_shape, shape_of
from tests.models.reference import TINY

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", TINY)
def test_shape_from_the_config_is_that_of_the_model(name, checkpoint, load):
    path, reference = checkpoint(name)
    shape = read_shape(json.loads((path / "config.json").read_text()))
    model = load(path)
    assert shape == shape_of(model)
    if name != "gemma3":  # whose reference has a vision tower
        assert shape.num_params == reference.num_parameters()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_bigcode", "opt_post_norm", "mixtral"])
def test_flops_are_those_of_the_products_that_run(name, checkpoint, load, monkeypatch):
    """Every product of one forward pass is counted as it happens."""
    path, _ = checkpoint(name)
    model = load(path)
    flops = []
    forward = Linear.forward

    def counted(self, x):
        flops.append(2 * self.in_features * self.out_features * x.shape[0])
        return forward(self, x)

    monkeypatch.setattr(Linear, "forward", counted)
    num_tokens = 50
    spec = model.attention_specs[0]

    def attend(spec, q, k, v):
        return q.reshape(num_tokens, spec.num_q_heads * spec.head_dim)

    with torch.inference_mode():
        hidden = model(torch.arange(num_tokens) % 90, torch.arange(num_tokens), attend)
        in_layers = sum(flops)
        model.logits(hidden)
    shape = shape_of(model)
    assert in_layers == num_tokens * shape.layer_flops_per_token
    assert sum(flops) - in_layers == num_tokens * shape.head_flops_per_token
    assert shape.attention[0].num_q_heads == spec.num_q_heads


def test_windows_and_shared_heads(checkpoint):
    path, _ = checkpoint("gemma2")
    shape = read_shape(json.loads((path / "config.json").read_text()))
    assert [(one.window, one.num_layers) for one in shape.attention] == [(None, 1), (19, 2)]
    assert shape.kv_elements_per_token() == 3 * 2 * 2 * 10
    path, _ = checkpoint("gpt_bigcode")
    shape = read_shape(json.loads((path / "config.json").read_text()))
    assert shape.attention[0].num_kv_heads == 1
