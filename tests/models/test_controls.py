"""Negative controls of the parity tests: each mistake must be seen, or parity proves little."""

import pytest

from batchwright.attention.backends import torch_ref
from batchwright.models.layers import RMSNorm
from tests.models.reference import CONTROL, TINY

pytestmark = pytest.mark.cpu

WINDOWED = ("mistral", "qwen2_window", "smollm3_window", "gemma2", "gemma3_text")
LEARNED_POSITIONS = ("opt", "gpt2", "gpt_bigcode")


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "qwen3", "mixtral", "smollm3", "gemma2"])
def test_wrong_rotary_base_is_seen(name, checkpoint, load, error_of):
    path, theirs = checkpoint(name)
    rope = dict(theirs.config.rope_parameters)
    rope["rope_theta"] *= 1.05
    assert error_of(name, load(path, rope_parameters=rope)) > CONTROL


def test_wrong_local_rotary_base_is_seen(checkpoint, load, error_of):
    path, theirs = checkpoint("gemma3_text")
    for layer_type, settings in theirs.config.rope_parameters.items():
        wrong = {layer_type: {**settings, "rope_theta": settings["rope_theta"] * 1.05}}
        rope = {**theirs.config.rope_parameters, **wrong}
        assert error_of("gemma3_text", load(path, rope_parameters=rope)) > CONTROL


def test_rotating_every_layer_is_seen(checkpoint, load, error_of):
    model = load(checkpoint("smollm3")[0], no_rope_layers=[1] * 4)
    assert error_of("smollm3", model) > CONTROL


@pytest.mark.parametrize("name", TINY)
def test_mask_off_by_one_is_seen(name, checkpoint, load, error_of, monkeypatch):
    right = torch_ref.attend_dense

    def sees_the_next_token(spec, q, keys, values, q_positions, key_positions):
        return right(spec, q, keys, values, q_positions + 1, key_positions)

    monkeypatch.setattr(torch_ref, "attend_dense", sees_the_next_token)
    assert error_of(name, load(checkpoint(name)[0])) > CONTROL


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", WINDOWED)
def test_window_off_by_one_is_seen(name, change, checkpoint, load, error_of):
    path, theirs = checkpoint(name)
    window = theirs.config.sliding_window + change
    assert error_of(name, load(path, sliding_window=window)) > CONTROL


@pytest.mark.parametrize("name", LEARNED_POSITIONS)
def test_positions_off_by_one_are_seen(name, checkpoint, load, error_of):
    assert error_of(name, load(checkpoint(name)[0]), position_offset=1) > CONTROL


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_missing_norm_offset_is_seen(name, checkpoint, load, error_of):
    model = load(checkpoint(name)[0])
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.unit_offset = False
    assert error_of(name, model) > CONTROL


@pytest.mark.parametrize("entry", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_missing_soft_cap_is_seen(entry, checkpoint, load, error_of):
    assert error_of("gemma2", load(checkpoint("gemma2")[0], **{entry: None})) > CONTROL
