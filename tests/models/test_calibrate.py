"""Calibration: it runs for every kind of model, and its numbers are usable."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from batchwright.exec import hollow_steps, load_time, product_rates
from batchwright.exec.calibrate import calibrate
from batchwright.exec.hollow import hollow_model
from batchwright.models.layers import Linear
from batchwright.models.shape import read_shape
from batchwright.plan.cost import CostModel
from batchwright.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_rates_are_positive_numbers(name, checkpoint, monkeypatch):
    monkeypatch.setattr("batchwright.exec.calibrate.S_PER_POINT", 1e-3)
    monkeypatch.setattr("batchwright.exec.calibrate.BANDWIDTH_BYTES", 2**20)
    monkeypatch.setattr(product_rates, "COLD_BYTES", 2**20)
    monkeypatch.setattr(hollow_steps, "S_PER_STEP", 1e-3)
    monkeypatch.setattr(hollow_steps, "KV_BYTES", 2**20)
    path, _ = checkpoint(name)
    config = json.loads((path / "config.json").read_text())
    shape = read_shape(config)
    hardware = calibrate(config, shape, dtype=torch.float32, attention="numba", num_threads=1)
    rates = [*hardware.layers.flops_per_s, *hardware.head.flops_per_s]
    rates += [hardware.attention_flops_per_s, hardware.kv_bytes_per_s]
    rates += [hardware.ceiling_flops_per_s, hardware.memory_bytes_per_s]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    for seconds in (hardware.step_s, hardware.token_s, hardware.draw_s):
        assert 0 <= seconds < 1
    num_keys = [100] * len(shape.attention)
    assert 0 < CostModel(shape, hardware).work_s(10, num_keys, 10, 10) < 10


def test_a_hollow_model_has_no_weights(checkpoint):
    path, _ = checkpoint("llama")
    config = json.loads((path / "config.json").read_text())
    model = hollow_model(config, dtype=torch.float32, max_positions=64, max_tokens=8)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert linears
    assert all(linear.weight.is_meta for linear in linears)
    x = torch.ones(3, linears[0].weight.shape[1])
    assert linears[0](x).shape == (3, linears[0].weight.shape[0])


def test_time_to_load_grows_with_the_files(checkpoint, monkeypatch):
    path, _ = checkpoint("llama")
    num_bytes = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    monkeypatch.setattr(load_time, "_read_rate", lambda file: num_bytes / 3)
    packing_s = num_bytes / load_time.PACKED_BYTES_PER_S
    seconds = load_time.load_s(open_checkpoint(path))
    assert seconds == pytest.approx(load_time.CHECK_S + 3 + packing_s)


def test_reading_is_measured(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"0" * 1000)
    assert load_time._read_rate(file) > 0
