"""The reference attention backend and bf16 through the whole engine."""

from __future__ import annotations

import pytest
import torch

from batchwright.config import EngineConfig
from batchwright.errors import ConfigError
from batchwright.opened_model import open_model
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


def test_keys_and_values_in_bf16_change_no_token_by_the_batch(tmp_path):
    make_checkpoint("llama", tmp_path)
    together = run(tmp_path, mixed_job(), kv_cache_dtype="bfloat16")
    in_parts = run(
        tmp_path,
        mixed_job(),
        kv_cache_dtype="bfloat16",
        max_num_seqs=3,
        max_num_batched_tokens=17,
        prefix_sharing=False,
    )
    assert together.tokens() == in_parts.tokens()
    plain = run(tmp_path, mixed_job()).tokens()
    same = sum(a == b for a, b in zip(together.tokens(), plain, strict=True))
    assert same >= len(plain) / 2, "rounded to 8 bits, most greedy rows of a tiny model stay"


def test_bf16_halves_what_a_token_takes():
    settings = {"kv_cache_bytes": 2**28, "max_model_len": 256}
    plain = open_model("smollm2", settings)
    half = open_model("smollm2", settings | {"kv_cache_dtype": "bfloat16"})
    assert (half.kv_dtype, plain.kv_dtype) == (torch.bfloat16, torch.float32)
    assert half.groups[0].num_blocks == 2 * plain.groups[0].num_blocks
    assert half.identity() == plain.identity() | {"kv_cache_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_cache_dtype": "int8"}, "must be auto or bfloat16"),
        ({"kv_cache_dtype": "bfloat16", "attention": "torch_ref"}, "leave one of them out"),
    ],
)
def test_formats_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**settings).check()


def test_a_card_keeps_its_own_format():
    with pytest.raises(ConfigError, match="which is for the CPU"):
        EngineConfig(kv_cache_dtype="bfloat16").resolve(
            context_length=64, free_memory_bytes=2**30, num_gpus=1
        )


def test_an_unknown_backend_is_a_clear_error(tmp_path):
    make_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match="there are numba, numba_bf16, torch_ref"):
        run(tmp_path, [], attention="fast")
