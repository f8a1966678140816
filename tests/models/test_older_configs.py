"""Configs as transformers 4 and the hub spell them mean what those of transformers 5 mean."""

import pytest
import torch

from batchwright.models.loader import load_model, read_config
from batchwright.weights.checkpoint import open_checkpoint
from tests.models.reference import CONTROL, TOLERANCE

pytestmark = pytest.mark.cpu


def flat_rope(rope):
    """`rope_parameters` as `rope_theta` and `rope_scaling`."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    has_scaling = scaling["rope_type"] != "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if has_scaling else None}


def gemma3_rope(rope):
    """Windows had a base of their own and were never scaled."""
    local = rope["sliding_attention"]["rope_theta"]
    return {**flat_rope(rope["full_attention"]), "rope_local_base_freq": local}


OLDER = {
    # checkpoint: what is added, what is left out beside rope_parameters
    "llama": ({}, ["head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias"]),
    "llama_biased": ({}, []),
    "llama_yarn": ({}, ["head_dim"]),
    "mistral": ({}, ["head_dim"]),
    "mixtral": ({}, ["head_dim"]),
    "qwen2_window": ({}, ["layer_types"]),
    "qwen3_moe": ({"num_experts": 7}, ["num_local_experts"]),
    "smollm3": ({}, ["layer_types", "no_rope_layers", "tie_word_embeddings"]),
    "smollm3_window": ({}, ["layer_types"]),
    "gemma2": ({}, ["layer_types", "tie_word_embeddings", "hidden_activation"]),
    "gemma3_text": ({"sliding_window_pattern": 2}, ["layer_types", "tie_word_embeddings"]),
}


@pytest.mark.parametrize("name", OLDER)
def test_older_spelling(name, checkpoint, error_of):
    source = open_checkpoint(checkpoint(name)[0])
    added, left_out = OLDER[name]
    rope = source.config.pop("rope_parameters")
    source.config.update(gemma3_rope(rope) if name == "gemma3_text" else flat_rope(rope))
    for entry in left_out:
        del source.config[entry]
    source.config.update(added)
    model = load_model(source, dtype=torch.float32, max_positions=256)
    assert error_of(name, model) < TOLERANCE


def test_a_wrong_pattern_is_seen(checkpoint, load, error_of):
    model = load(checkpoint("gemma3_text")[0], layer_types=None, sliding_window_pattern=3)
    assert error_of("gemma3_text", model) > CONTROL


def test_rotary_base_that_a_config_leaves_out():
    """Llama 2's files do not name it; each family has its own default."""
    for model_type, theta in (("smollm3", 2e6), ("mixtral", 1e6), ("gemma3_text", 1e6)):
        sizes = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), 8)
        sizes |= {"vocab_size": 8, "max_position_embeddings": 8}
        assert read_config({"model_type": model_type, **sizes})["rope_theta"] == theta
