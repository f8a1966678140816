"""Contract 1 for whole models: with the CPU backend, logits are bit-identical however the tokens
are cut into steps and whatever company they have."""

import pytest
import torch

from batchwright.attention.backends import numba as cpu_backend
from tests.models.ragged import ragged_logits
from tests.models.reference import TINY, TOLERANCE, random_sequences

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", TINY)
def test_same_bits_in_chunks_and_alone(name, checkpoint, load, error_of):
    model = load(checkpoint(name)[0])
    sequences = random_sequences()
    backend = cpu_backend.Backend()
    together = ragged_logits(model, sequences, backend=backend)
    in_chunks = ragged_logits(model, sequences, chunk=13, backend=backend)
    alone = [ragged_logits(model, [ids], backend=backend)[0] for ids in sequences[1:4]]
    for a, b in zip(together, in_chunks, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(together[1:4], alone, strict=True):
        assert torch.equal(a, b)
    assert error_of(name, model, backend=backend) < TOLERANCE
