"""Every architecture against transformers: logits of ragged batches, whole and in chunks."""

import pytest

from tests.models.ragged import ragged_logits
from tests.models.reference import (
    TINY,
    TOLERANCE,
    make_checkpoint,
    random_sequences,
    reference_logits,
    relative_error,
)

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(name, checkpoint, load, error_of):
    model = load(checkpoint(name)[0])
    errors = [error_of(name, model, chunk=chunk) for chunk in (None, 7)]
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "gpt2"])
def test_one_token_at_a_time(name, checkpoint, load, error_of):
    assert error_of(name, load(checkpoint(name)[0]), chunk=1) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_bigcode"])
def test_other_seeds(name, tmp_path, load):
    theirs = make_checkpoint(name, tmp_path, seed=7)
    sequences = random_sequences((5, 64, 97), seed=7)
    ours = ragged_logits(load(tmp_path), sequences)
    assert relative_error(ours, reference_logits(theirs, sequences)) < TOLERANCE
