"""Rotary tables against transformers' frequencies, to the bit, in old and new config forms."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from batchwright.errors import UnsupportedModelError
from batchwright.models.rotary import rotary_parameters, rotary_table

pytestmark = pytest.mark.cpu

HEAD_DIM = 64
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_fractional": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 65536,
        "attention_factor": 1.25,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
def test_same_bits_as_transformers(name, theta):
    scaling = SCALINGS[name]
    theirs = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, device="cpu")
    positions = torch.arange(5000, dtype=torch.float32)
    angles = positions[:, None] * inv_freq[None]
    old = {"rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": 131072}
    new = {"rope_parameters": {**scaling, "rope_theta": theta}, "max_position_embeddings": 131072}
    for config in (old, new):
        table = rotary_table(rotary_parameters(config), HEAD_DIM, len(positions))
        assert torch.equal(table.cos, angles.cos() * factor)
        assert torch.equal(table.sin, angles.sin() * factor)
        assert table.rotary_dim == HEAD_DIM


def test_default_base_and_old_type_key():
    assert rotary_parameters({"max_position_embeddings": 9})["rope_theta"] == 10000.0
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 9}
    assert rotary_parameters(old)["rope_type"] == "linear"


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "nonsense"])
def test_unknown_type_is_named(rope_type):
    parameters = rotary_parameters(
        {"rope_scaling": {"rope_type": rope_type}, "max_position_embeddings": 9}
    )
    with pytest.raises(UnsupportedModelError, match=f"{rope_type}.*supported: default, linear"):
        rotary_table(parameters, HEAD_DIM, 4)


def test_partial_rotation_is_named():
    config = {"partial_rotary_factor": 0.5, "model_type": "llama", "max_position_embeddings": 9}
    with pytest.raises(UnsupportedModelError, match=r"partial_rotary_factor 0\.5"):
        rotary_parameters(config)
