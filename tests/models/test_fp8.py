"""--quantize fp8 in whole models, by the twin: what is quantised, and against transformers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from batchwright.config import EngineConfig
from batchwright.errors import ConfigError
from batchwright.exec.device.formats import check_fp8_sizes
from batchwright.kernels.fp8_linear.naive import FP8, fp8_linear, quantize_rows
from batchwright.models.layers import Embedding, Linear
from batchwright.models.loader import build_empty, load_model
from batchwright.models.moe import SparseMoE
from batchwright.opened_model import open_model
from batchwright.weights.checkpoint import open_checkpoint
from tests.models.ragged import ragged_logits
from tests.models.reference import (
    make_checkpoint,
    random_sequences,
    reference_logits,
    relative_error,
)

pytestmark = pytest.mark.cpu

SIZES = {"hidden_size": 96, "intermediate_size": 80, "head_dim": 16}
"""Multiples of 16, which those of the tiny checkpoints are not."""


def load(path, quantize=None):
    source = open_checkpoint(path)
    return load_model(source, dtype=torch.float32, max_positions=256, quantize=quantize)


def test_rows_are_within_half_a_step_of_e4m3():
    x = torch.randn(50, 300) * torch.logspace(-6, 6, 50)[:, None]
    values, scales = quantize_rows(x)
    assert values.dtype == FP8 and scales.shape == (50, 1)
    assert torch.equal(values.float().abs().amax(1), torch.full((50,), 448.0))
    error = (values.float() * scales - x).abs()
    smallest = x.abs().amax(1, keepdim=True) * 2.0**-9 / 448  # the least step, of subnormal numbers
    assert (error <= torch.maximum(x.abs() / 16, smallest)).all()


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = torch.randn(5, 64)
    x[0], x[1, 3], x[2, 5] = 0.0, torch.inf, torch.nan
    x[3], x[3, 0] = 0.0, 1e-44  # a scale of 1 / 448 of it would be 0
    weight, scales = quantize_rows(torch.randn(32, 64))
    y = fp8_linear(x, weight, scales)
    assert torch.equal(y[0], torch.zeros(32))
    assert y[1:3].isnan().all() and y[3:].isfinite().all()


def test_a_row_does_not_depend_on_the_others():
    x, (weight, scales) = torch.randn(9, 64), quantize_rows(torch.randn(32, 64))
    x[0] *= 1e4  # with one scale for all, the others would vanish
    together, alone = fp8_linear(x, weight, scales), fp8_linear(x[4:5], weight, scales)
    assert torch.allclose(together[4:5], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_logits_are_those_of_transformers_with_the_same_roundings(name, tmp_path):
    sequences = random_sequences()
    reference = make_checkpoint(name, tmp_path, **SIZES)
    plain = reference_logits(reference, sequences)
    for path, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            values, scales = quantize_rows(module.weight)
            module.weight.data = values.float() * scales
            module.register_forward_pre_hook(_round_inputs)
    rounded = reference_logits(reference, sequences)
    ours = ragged_logits(load(tmp_path, "fp8"), sequences)
    # a sum in another order may take an input to the other neighbour of e4m3
    assert relative_error(ours, rounded) < 0.2 * relative_error(ours, plain)


def _round_inputs(module, inputs):
    (x,) = inputs
    values, scales = quantize_rows(x.flatten(0, -2))
    return ((values.float() * scales).view(x.shape),)


def test_products_are_fp8_but_routers_head_and_embeddings_keep_their_values(tmp_path):
    make_checkpoint("mixtral", tmp_path, **SIZES)
    plain, model = load(tmp_path), load(tmp_path, "fp8")
    ids = torch.arange(90)
    x = torch.randn(5, 96)
    for path, module in model.named_modules():
        other = plain.get_submodule(path)
        if isinstance(module, Embedding):
            assert torch.equal(module(ids), other(ids))
        elif isinstance(module, Linear) and path.endswith((".gate", "lm_head")):
            assert torch.allclose(module(x), other(x), atol=1e-6)
        elif isinstance(module, Linear):
            assert module.weight.dtype == FP8, path
            assert module.scales.shape == (module.out_features, 1)


@pytest.mark.parametrize(
    ("changes", "num_ranks", "message"),
    [
        ({"intermediate_size": 72}, 1, r"layers\.0\.mlp\.\w+ has (96 inputs and 144|72 inputs)"),
        ({}, 2, r"on each of 2 ranks; leave quantize out, or use fewer ranks"),
        ({"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}, 2, None),
    ],
)
def test_sizes_that_tensor_cores_cannot_take_are_refused(changes, num_ranks, message, tmp_path):
    make_checkpoint("llama", tmp_path, **{**SIZES, **changes})
    model = build_empty(json.loads((tmp_path / "config.json").read_text()), 1)
    if message is None:
        check_fp8_sizes(model, num_ranks)
        return
    with pytest.raises(ConfigError, match=message):
        check_fp8_sizes(model, num_ranks)


def test_a_stacked_mixture_has_every_experts_numbers_and_scales(tmp_path):
    make_checkpoint("mixtral", tmp_path, **SIZES)
    model = load(tmp_path, "fp8")
    mixtures = [module for module in model.modules() if isinstance(module, SparseMoE)]
    for mixture in mixtures:
        before = [
            [(linear.weight.view(torch.uint8).clone(), linear.scales) for linear in linears]
            for linears in (
                [expert.gate_up_proj for expert in mixture.experts],
                [expert.down_proj for expert in mixture.experts],
            )
        ]
        mixture.stack()
        for which, linears in enumerate(before):
            for expert, (values, scales) in enumerate(linears):
                stacked = mixture.stacked[which][expert]
                assert torch.equal(stacked.view(torch.uint8), values)
                assert torch.equal(mixture.stacked_scales[which][expert], scales[:, 0])
    assert mixtures


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "fp4"}, "quantize is 'fp4', must be int8 or fp8, or None"),
        ({"quantize": "fp8", "dtype": "float32"}, "take and give bfloat16, so leave dtype out"),
        ({"quantize": "fp8", "device": "cpu"}, "is for cuda, and device is cpu"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings).check()


def test_it_needs_a_gpu():
    given = {"context_length": 100, "free_memory_bytes": 10**9}
    with pytest.raises(ConfigError, match="torch finds none; use int8 on the CPU"):
        EngineConfig(quantize="fp8").resolve(**given)
    assert EngineConfig(quantize="fp8").resolve(**given, num_gpus=1).dtype == "bfloat16"


def test_it_is_part_of_what_answers_depend_on_and_of_the_memory():
    plain = open_model("smollm2", {})
    on_gpu = dataclasses.replace(plain.config, device="cuda", dtype="bfloat16")
    bf16 = dataclasses.replace(plain, config=on_gpu)
    fp8 = dataclasses.replace(plain, config=dataclasses.replace(on_gpu, quantize="fp8"))
    assert fp8.identity() == {**bf16.identity(), "quantize": "fp8"}
    table = plain.shape.vocab_size * plain.shape.hidden_size
    assert fp8.weight_bytes == plain.shape.num_params - table + 2 * table  # tied: one table, bf16
