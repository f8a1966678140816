"""--quantize int8 in whole models: what is quantised, what is not, and the same bits always."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from batchwright.attention.backends import numba as cpu_backend
from batchwright.config import EngineConfig
from batchwright.errors import ConfigError
from batchwright.exec import hollow_steps, product_rates
from batchwright.exec.calibrate import calibrate
from batchwright.kernels.int8_linear import numba as int8_kernel
from batchwright.models.layers import Embedding, Linear
from batchwright.models.loader import load_model
from batchwright.models.shape import read_shape, shape_of
from batchwright.opened_model import open_model
from batchwright.weights.checkpoint import open_checkpoint
from tests.models.ragged import ragged_logits
from tests.models.reference import TINY, random_sequences

pytestmark = pytest.mark.cpu


@pytest.fixture
def load_int8(checkpoint):
    """A tiny checkpoint's model in int8."""

    def get(name: str, dtype: torch.dtype = torch.float32):
        source = open_checkpoint(checkpoint(name)[0])
        return load_model(source, dtype=dtype, max_positions=256, quantize="int8")

    return get


@pytest.mark.parametrize("name", TINY)
def test_same_bits_in_chunks_and_alone(name, load_int8, error_of):
    model = load_int8(name)
    sequences = random_sequences()
    backend = cpu_backend.Backend()
    together = ragged_logits(model, sequences, backend=backend)
    in_chunks = ragged_logits(model, sequences, chunk=13, backend=backend)
    alone = [ragged_logits(model, [ids], backend=backend)[0] for ids in sequences[1:4]]
    for a, b in zip(together, in_chunks, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(together[1:4], alone, strict=True):
        assert torch.equal(a, b)
    # Random weights magnify every rounding, most of all through a router; here: not nonsense.
    assert 1e-5 < error_of(name, model, backend=backend) < 1.5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "opt_post_norm"])
def test_products_are_int8_but_routers_and_embeddings_keep_their_values(name, load, load_int8,
                                                                        checkpoint):  # fmt: skip
    plain, model = load(checkpoint(name)[0]), load_int8(name)
    ids = torch.arange(90)
    linears = dict(model.named_modules())
    for path, module in plain.named_modules():
        other = linears[path]
        if isinstance(module, Linear):
            is_router = path.endswith(".gate")
            assert other.weight.dtype == (torch.float32 if is_router else torch.uint8), path
            if is_router:
                assert torch.equal(other.weight, module.weight)
        elif isinstance(module, Embedding):
            assert torch.equal(other(ids), module(ids))
            assert other(ids).dtype == torch.float32
        else:
            for key, value in module.named_parameters(recurse=False):
                assert torch.equal(getattr(other, key), value)


def test_embeddings_of_16_bits_stay_so_and_give_the_same_rows():
    for dtype in (torch.bfloat16, torch.float16):
        table = Embedding(50, 16, scale=3.3)
        table.weight.data = torch.randn(50, 16).to(dtype).float()
        rows = table(torch.arange(50))
        table.narrow()
        assert table.weight.dtype == dtype
        assert torch.equal(table(torch.arange(50)), rows)
    table.weight.data = torch.full((2, 2), 1 / 3)
    table.narrow()
    assert table.weight.dtype == torch.float32


def test_fp32_never_comes_to_an_int8_product(checkpoint, load, monkeypatch):
    def refuse(*args):
        raise AssertionError("int8")

    monkeypatch.setattr(int8_kernel, "int8_linear", refuse)
    for name in TINY:
        ragged_logits(load(checkpoint(name)[0]), random_sequences()[:1])
    assert EngineConfig().quantize is None
    source = open_checkpoint(checkpoint("llama")[0])
    model = load_model(source, dtype=torch.float32, max_positions=256, quantize="int8")
    with pytest.raises(AssertionError, match="int8"):
        ragged_logits(model, random_sequences()[:1])


def test_other_number_formats_are_refused(load_int8):
    with pytest.raises(ConfigError, match="fp32 weights on the CPU, not torch"):
        load_int8("llama", torch.bfloat16)
    with torch.device("meta"), pytest.raises(ConfigError, match="on meta"):
        Linear(8, 8).quantize_int8()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "int4"}, "quantize is 'int4', must be int8 or fp8, or None"),
        ({"quantize": "int8", "dtype": "bfloat16"}, "leave dtype out"),
        ({"quantize": "int8", "device": "cuda"}, "is for cpu, and device is cuda"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings).check()


def test_where_there_is_a_gpu_the_cpu_must_be_asked_for():
    given = {"context_length": 100, "free_memory_bytes": 10**9, "num_gpus": 1}
    with pytest.raises(ConfigError, match="--device cpu"):
        EngineConfig(quantize="int8").resolve(**given)
    assert EngineConfig(quantize="int8", device="cpu").resolve(**given).dtype == "float32"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_the_shape_is_that_of_the_fp32_model(name, checkpoint, load_int8):
    path, _ = checkpoint(name)
    assert shape_of(load_int8(name)) == read_shape(json.loads((path / "config.json").read_text()))


def test_it_is_part_of_what_answers_depend_on_and_of_the_memory():
    plain, int8 = (open_model("smollm2", {"quantize": one}) for one in (None, "int8"))
    assert "quantize" not in plain.identity()
    bits = int8_kernel.activation_bits()
    assert int8.identity() == {**plain.identity(), "quantize": "int8", "activation_bits": bits}
    assert int8.weight_bytes < 4 * plain.shape.num_params / 2
    assert dataclasses.asdict(int8.config)["quantize"] == "int8"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_calibration_measures_int8_products(name, checkpoint, monkeypatch):
    monkeypatch.setattr("batchwright.exec.calibrate.S_PER_POINT", 1e-3)
    monkeypatch.setattr("batchwright.exec.calibrate.BANDWIDTH_BYTES", 2**20)
    monkeypatch.setattr(product_rates, "COLD_BYTES", 2**20)
    monkeypatch.setattr(hollow_steps, "S_PER_STEP", 1e-3)
    monkeypatch.setattr(hollow_steps, "KV_BYTES", 2**20)
    calls = []
    measured = int8_kernel.int8_linear
    monkeypatch.setattr(
        int8_kernel, "int8_linear", lambda *args: (calls.append(args[0].shape), measured(*args))
    )
    config = json.loads((checkpoint(name)[0] / "config.json").read_text())
    hardware = calibrate(
        config,
        read_shape(config),
        dtype=torch.float32,
        attention="numba",
        num_threads=1,
        quantize="int8",
    )
    assert {512, 64, 1} <= {rows for rows, _ in calls}
    assert all(math.isfinite(rate) and rate > 0 for rate in hardware.layers.flops_per_s)
