"""Shapes known by name are those that are counted from the modules."""

from __future__ import annotations

import pytest

from batchwright.models.shape import read_shape
from batchwright.plan.model_shapes import MODELS, decoder_shape

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", MODELS)
def test_a_named_shape_is_that_of_the_modules(name):
    sizes = MODELS[name]
    config = {
        **sizes._asdict(),
        "architectures": ["Qwen2ForCausalLM" if sizes.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if sizes.qkv_bias else "llama",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    }
    assert decoder_shape(sizes) == read_shape(config)


def test_sizes_are_those_the_models_are_named_for():
    billions = {name: decoder_shape(sizes).num_params / 1e9 for name, sizes in MODELS.items()}
    assert billions == pytest.approx(
        {
            "Llama-3-8B": 8.03,
            "Llama-3-70B": 70.55,
            "Qwen2.5-7B": 7.62,
            "SmolLM2-135M": 0.1345,
            "CodeLlama-13B": 13.02,
            "CodeLlama-34B": 33.74,
            "LLaMA-13B": 13.02,
        },
        rel=1e-3,
    )
