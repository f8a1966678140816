"""Whole models row by row: with attention taken out, a token's bits do not depend on the batch."""

import pytest
import torch

from tests.models.reference import TINY

pytestmark = pytest.mark.cpu


def attend_to_itself(spec, q, k, v):
    """What attention gives a sequence of one token: its value, for each query head."""
    return v.repeat_interleave(spec.num_q_heads // spec.num_kv_heads, dim=1).flatten(1)


@pytest.mark.parametrize("name", TINY)
def test_tokens_have_the_same_bits_in_any_batch(name, checkpoint, load):
    model = load(checkpoint(name)[0])
    token_ids, positions = torch.randint(0, 90, (201,)), torch.randint(0, 256, (201,))
    with torch.inference_mode():
        together = model.logits(model(token_ids, positions, attend_to_itself))
        for size in (1, 2, 11, 12, 13, 64, 100):
            some = torch.randperm(201)[:size]
            alone = model.logits(model(token_ids[some], positions[some], attend_to_itself))
            assert torch.equal(alone, together[some])
