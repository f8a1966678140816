"""The reference attention backend and bf16 through the whole engine."""

from __future__ import annotations

import pytest

from batchwright.errors import ConfigError
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


def test_an_unknown_backend_is_a_clear_error(tmp_path):
    make_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match="there are numba, torch_ref"):
        run(tmp_path, [], attention="fast")
