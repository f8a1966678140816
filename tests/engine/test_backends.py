"""The reference attention backend and bf16 through the whole engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from batchwright.attention.backend import AttentionBatch, GroupBatch, block_bytes
from batchwright.attention.spec import AttentionSpec
from batchwright.config import EngineConfig
from batchwright.errors import ConfigError
from batchwright.opened_model import open_model
from batchwright.techniques import find
from tests.engine.harness import mixed_job, run
from tests.engine.test_parity import check_against_reference
from tests.models.reference import make_checkpoint

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_reference_backend_gives_the_same_tokens(name, tmp_path):
    model = make_checkpoint(name, tmp_path)
    outcome = run(tmp_path, mixed_job(), attention="torch_ref", max_num_batched_tokens=50,
                  max_num_seqs=4)  # fmt: skip
    check_against_reference(name, outcome, model)
    assert outcome.tokens() == run(tmp_path, mixed_job()).tokens()


def test_bf16_chooses_what_transformers_in_bf16_finds_nearly_best(tmp_path):
    """Level rounding: a bf16 logit near 8 is rounded by up to 2^-6, and so are all before it."""
    model = make_checkpoint("llama", tmp_path).bfloat16()
    outcome = run(tmp_path, mixed_job(max_tokens=6), dtype="bfloat16")
    check_against_reference("llama", outcome, model, tie=0.5)


@pytest.mark.parametrize(
    ("name", "kv_cache_dtype"), [("llama", "int8"), ("gemma2", "int8"), ("mistral", "bfloat16")]
)
def test_keys_and_values_in_fewer_bits_change_nothing_by_the_batch(name, kv_cache_dtype, tmp_path):
    """Bits of log-probabilities, in other batches, in little memory, and without sharing."""
    make_checkpoint(name, tmp_path)
    together = run(tmp_path, scored_job(), kv_cache_dtype=kv_cache_dtype)
    for settings in (
        {"max_num_seqs": 3, "max_num_batched_tokens": 17, "prefix_sharing": False},
        {"max_num_seqs": 5, "max_num_batched_tokens": 64, "kv_tokens": 640},
    ):
        other = run(tmp_path, scored_job(), kv_cache_dtype=kv_cache_dtype, **settings)
        assert other.tokens() == together.tokens()
        assert logprobs_of(other) == logprobs_of(together)
    plain = run(tmp_path, scored_job())
    assert logprobs_of(plain) != logprobs_of(together), "they are rounded"
    first = {id: rows[0][0] for id, rows in logprobs_of(plain).items()}
    errors = [abs(rows[0][0] - first[id]) for id, rows in logprobs_of(together).items()]
    assert 0 < np.mean(errors) < 0.1, "of the first token of each row"


def scored_job():
    return [
        dataclasses.replace(request, params=dataclasses.replace(request.params, logprobs=0))
        for request in mixed_job()
    ]


def logprobs_of(outcome) -> dict[str, list[list[float]]]:
    return {
        id: [[token.logprob for token in output.logprobs] for output in result.outputs]
        for id, result in outcome.results.items()
    }


@pytest.mark.parametrize(("dtype", "element_bytes"), [("bfloat16", 2.0), ("int8", 1 + 4 / 64)])
def test_what_a_token_takes(dtype, element_bytes):
    settings = {"kv_cache_bytes": 2**28, "max_model_len": 256}
    plain = open_model("smollm2", settings)
    narrow = open_model("smollm2", settings | {"kv_cache_dtype": dtype})
    assert (narrow.kv_element_bytes, plain.kv_element_bytes) == (element_bytes, 4.0)
    block_elements = 30 * 2 * 3 * 64 * 32
    assert narrow.groups[0].num_blocks == 2**28 // (block_elements * element_bytes)
    backend = find("attention.backends", narrow.config.attention).Backend()
    spec = AttentionSpec(layer=0, num_q_heads=9, num_kv_heads=3, head_dim=64, scale=1.0)
    layer = backend.allocate(spec, 2, 32, torch.float32)
    num_bytes = layer.keys.nbytes + layer.values.nbytes
    assert num_bytes == 2 * block_bytes(spec, 32, element_bytes)
    assert narrow.identity() == plain.identity() | {"kv_cache_dtype": dtype}


@pytest.mark.parametrize("name", ["numba", "numba_bf16", "numba_int8"])
def test_copied_tokens_and_blocks_are_the_same(name):
    """Numbers and scales: what is attended to through the copy is what is through the first."""
    spec = AttentionSpec(layer=0, num_q_heads=2, num_kv_heads=2, head_dim=16, scale=1.0)
    backend = find("attention.backends", name).Backend()
    torch.manual_seed(0)
    kv = backend.allocate(spec, 6, 32, torch.float32)

    def attend(table, position, write):
        q, k, v = (torch.randn(1, 2, 16) * write for _ in range(3))
        batch = AttentionBatch(
            slots=np.zeros(1, np.int32),
            cu_seqlens_q=np.array([0, 1], np.int32),
            positions=np.array([position], np.int32),
            position_ids=np.array([position], np.int32),
            groups=(
                GroupBatch(
                    block_table=np.array([table], np.int32),
                    slot_mapping=np.array(
                        [table[position // 32] * 32 + position % 32 if write else -1], np.int32
                    ),
                ),
            ),
            block_size=32,
        )
        q = torch.linspace(-1, 1, 32).reshape(1, 2, 16) if not write else q
        return backend.run(spec, 0, q.clone(), k, v, kv, backend.plan(batch))

    for position in range(40):
        attend([1, 2], position, write=10.0 ** (position % 5 - 2))
    expected = attend([1, 2], 39, write=0)
    kv.copy_blocks(np.array([[1, 4]], np.int32))
    kv.copy_tokens(np.array([[2 * 32 + i, 5 * 32 + i] for i in range(8)], np.int32))
    for one, other in zip(attend([4, 5], 39, write=0), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_cache_dtype": "int4"}, "must be one of auto, bfloat16, int8, fp8"),
        ({"kv_cache_dtype": "int8", "attention": "torch_ref"}, "leave one of them out"),
        ({"kv_cache_dtype": "bfloat16", "attention": "torch_ref"}, "leave one of them out"),
    ],
)
def test_formats_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**settings).check()


@pytest.mark.parametrize(
    ("num_gpus", "settings", "words"),
    [
        (0, {"kv_cache_dtype": "fp8"}, "which is for GPUs; use int8"),
        (1, {"kv_cache_dtype": "fp8", "device": "cpu"}, "which is for GPUs; use int8"),
        (1, {"kv_cache_dtype": "bfloat16", "dtype": "float32"}, "leave one of them out"),
        (1, {"kv_cache_dtype": "bfloat16"}, None),
        (1, {"kv_cache_dtype": "fp8"}, None),
        (1, {"kv_cache_dtype": "int8"}, None),
    ],
)
def test_formats_are_those_of_the_device(num_gpus, settings, words):
    def resolve():
        return EngineConfig(**settings).resolve(
            context_length=64, free_memory_bytes=2**30, num_gpus=num_gpus
        )

    if words is None:
        assert resolve().kv_cache_dtype == settings["kv_cache_dtype"]
    else:
        with pytest.raises(ConfigError, match=words):
            resolve()


def test_an_unknown_backend_is_a_clear_error(tmp_path):
    make_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match="there are numba, numba_bf16, numba_int8, torch_ref"):
        run(tmp_path, [], attention="fast")
