"""What a few layers tell of all of them, with a clock that only products and norms move."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from batchwright.exec import layer_slice
from batchwright.exec.calibrate import _corrected
from batchwright.exec.layer_slice import NUM_LAYERS, LayerSlice
from batchwright.models.layers import Linear, RMSNorm
from batchwright.models.shape import read_shape
from batchwright.plan.cost import RateCurve

pytestmark = pytest.mark.cpu

NUM_LAYERS_OF_MODEL = 9


@pytest.fixture
def config(checkpoint):
    path, _ = checkpoint("llama")
    config = json.loads((path / "config.json").read_text())
    return config | {"num_hidden_layers": NUM_LAYERS_OF_MODEL}


def attend(spec, q, k, v):
    return q.reshape(q.shape[0], -1)


def test_times_of_few_layers_are_those_of_all(config, monkeypatch):
    """A product takes 1 s, a norm 0.25 s; the first layer's first norm takes 5 s more, once."""
    now, extra = [0.0], [5.0]
    clock = SimpleNamespace(thread_time=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(layer_slice, "time", clock)

    def slowed(forward, seconds):
        def call(self, *args):
            now[0] += seconds
            if isinstance(self, RMSNorm):
                now[0] += extra[0]
                extra[0] = 0.0
            return forward(self, *args)

        return call

    monkeypatch.setattr(Linear, "forward", slowed(Linear.forward, 1.0))
    monkeypatch.setattr(RMSNorm, "forward", slowed(RMSNorm.forward, 0.25))
    monkeypatch.setattr(RMSNorm, "after_sum", slowed(RMSNorm.after_sum, 0.25))
    part = LayerSlice(config, dtype=torch.float32, max_positions=64, max_tokens=8)
    tokens = torch.arange(5)
    with torch.inference_mode():
        found = part.seconds(lambda: part.model(tokens, tokens, attend))
    assert found.products == pytest.approx(NUM_LAYERS_OF_MODEL * 4)
    final_norm = 0.25
    assert found.rest == pytest.approx(NUM_LAYERS_OF_MODEL * 2 * 0.25 + final_norm + 5.0)


def test_times_of_a_program_of_few_layers_are_those_of_all(config, monkeypatch):
    """A step takes 10 s of the thread and 20 by the clock; 8 of these in products, 4 in norms."""
    now, kernels = [0.0], Counter(linear=1.0, rms_norm=1.0)
    clock = SimpleNamespace(thread_time=lambda: now[0], perf_counter=lambda: 2 * now[0])
    monkeypatch.setattr(layer_slice, "time", clock)
    part = LayerSlice(config, dtype=torch.float32, max_positions=64, max_tokens=8)

    def execute():
        now[0] += 10.0
        kernels.update(linear=8.0, rms_norm=4.0)

    programs = SimpleNamespace(seconds_by_kernel=lambda: Counter(kernels))
    found = part.seconds(execute, programs)
    scale = NUM_LAYERS_OF_MODEL / NUM_LAYERS
    assert found.products == pytest.approx(scale * 4.0)
    assert found.rest == pytest.approx(4.0 + scale * 2.0)


@pytest.mark.parametrize("pool_bytes, num_turns", [(2**28, 2), (1, 1)])
def test_weights_take_turns_in_the_memory_that_there_is(config, monkeypatch, pool_bytes, num_turns):
    """Nine layers hold those of four twice; weights of large models are too large for any pool."""
    monkeypatch.setattr(layer_slice, "POOL_BYTES", pool_bytes)
    part = LayerSlice(config, dtype=torch.float32, max_positions=64, max_tokens=8)
    assert part.num_turns == num_turns


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
def test_only_the_slice_has_weights(config, form):
    part = LayerSlice(config, dtype=torch.float32, max_positions=64, max_tokens=8, form=form)
    real = [m for m in part.model.modules() if isinstance(m, Linear) and not m.weight.is_meta]
    assert len(real) == 4 * NUM_LAYERS == 4 * len(part.model.attention_specs)
    assert part.model.get_submodule("lm_head").weight.is_meta
    assert {m.weight.ndim for m in real} == {3}, "packed, as the model's are"
    starts = {m.weight.data_ptr() for m in real}
    assert len(starts) == len(real), "weights that are read again come from caches"


def test_a_curve_is_corrected_by_what_steps_took(config):
    """Twice as long with 10 rows, as long with 1,000, in between by the logarithm."""
    shape = read_shape(config)
    flops = shape.layer_flops_per_token
    curve = RateCurve((10, 100, 1000), (1e3, 1e4, 1e4))
    products = [(10, 2 * curve.seconds(10, flops)), (1000, curve.seconds(1000, flops))]
    assert _corrected(curve, products, shape).flops_per_s == pytest.approx((500, 1e4 / 1.5, 1e4))
