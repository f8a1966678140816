"""Token log-probabilities: against float64 and torch, ties, unsound rows, bits in every batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchwright import kernels
from batchwright.kernels.token_logprobs import naive
from batchwright.kernels.token_logprobs.numba import logprob_rows, token_logprobs
from batchwright.step import TokenLogprobs

pytestmark = pytest.mark.cpu

# The sum is good to 3e-7 nats; the answer is then rounded to float32 (half an ulp, relative 6e-8).
ATOL, RTOL = 4e-7, 1.2e-7


def make_rows(kind: str, num: int, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((num, vocab_size)) * {"wide": 30, "flat": 0.01}.get(kind, 3)
    if kind == "ties":
        x = np.round(x)
        x[x == 0] = rng.choice([0.0, -0.0], (x == 0).sum())
    if kind == "masked":
        x[rng.random(x.shape) < 0.8] = -np.inf
        x[:, 0] = 0
    return np.ascontiguousarray(x, np.float32)


def assert_equal(got: TokenLogprobs, expected: TokenLogprobs) -> None:
    np.testing.assert_allclose(got.logprobs, expected.logprobs, RTOL, ATOL)
    np.testing.assert_array_equal(got.ranks, expected.ranks)
    np.testing.assert_array_equal(got.top_ids, expected.top_ids)
    np.testing.assert_allclose(got.top_logprobs, expected.top_logprobs, RTOL, ATOL)
    assert all(a.dtype == b.dtype for a, b in zip(got, expected))


@pytest.mark.parametrize("kind", ["normal", "wide", "flat", "ties", "masked"])
@pytest.mark.parametrize("vocab_size", [1, 5, 64, 65, 3000])
@pytest.mark.parametrize("k", [0, 1, 5, 100])
def test_equal_to_the_naive_twin(kind: str, vocab_size: int, k: int) -> None:
    rng = np.random.default_rng([vocab_size, k])
    logits = make_rows(kind, 20, vocab_size, rng)
    token_ids = rng.integers(0, vocab_size, 20).astype(np.int32)
    token_ids[:10] = logits[:10].argmax(axis=1)
    got = token_logprobs(logits, token_ids, k)
    assert_equal(got, naive.token_logprobs(logits, token_ids, k))
    assert got.top_ids.shape == (20, min(k, vocab_size))


def test_equal_to_torch_at_full_width() -> None:
    rng = np.random.default_rng(0)
    logits = make_rows("normal", 8, 49_152, rng)
    token_ids = rng.integers(0, 49_152, 8).astype(np.int32)
    got = token_logprobs(logits, token_ids, 20)
    reference = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    top = reference.topk(20)
    np.testing.assert_allclose(got.top_logprobs, top.values.numpy(), RTOL, ATOL)
    np.testing.assert_array_equal(got.top_ids, top.indices.numpy())
    chosen = reference[torch.arange(8), torch.from_numpy(token_ids).long()]
    np.testing.assert_allclose(got.logprobs, chosen.numpy(), RTOL, ATOL)


def test_the_tolerance_can_fail() -> None:
    """Negative control: float32 log-softmax over a wide row is not within it everywhere."""
    rng = np.random.default_rng(1)
    logits = make_rows("flat", 50, 49_152, rng)
    reference = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    shifted = torch.log_softmax(torch.from_numpy(logits + np.float32(100)), -1)
    assert not np.allclose(shifted.numpy(), reference.numpy(), RTOL, ATOL)


def test_rank_and_ties() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 3.0, -0.0, 0.0]], np.float32).repeat(6, axis=0)
    lines = token_logprobs(logits, np.arange(6, dtype=np.int32), 6)
    assert lines.ranks.tolist() == [4, 1, 3, 1, 5, 5]
    assert lines.top_ids[0].tolist() == [1, 3, 2, 0, 4, 5]
    assert lines.logprobs[4] == lines.logprobs[5]


def test_a_chosen_token_and_its_place_among_the_rivals_have_the_same_bits() -> None:
    rng = np.random.default_rng(2)
    logits = make_rows("normal", 30, 500, rng)
    lines = token_logprobs(logits, logits.argmax(axis=1).astype(np.int32), 3)
    np.testing.assert_array_equal(lines.logprobs, lines.top_logprobs[:, 0])
    assert (lines.ranks == 1).all()


def test_unsound_rows_and_missing_tokens_are_empty_lines() -> None:
    rng = np.random.default_rng(3)
    logits = make_rows("normal", 6, 100, rng)
    logits[0, 99] = np.nan
    logits[1, 0] = np.inf
    logits[2] = -np.inf
    logits[4, 7] = -np.inf
    token_ids = np.array([0, 0, 0, -1, 7, 5], np.int32)
    lines = token_logprobs(logits, token_ids, 2)
    assert np.isnan(lines.logprobs[:4]).all() and (lines.ranks[:4] == 0).all()
    assert (lines.top_ids[:4] == -1).all() and np.isnan(lines.top_logprobs[:4]).all()
    assert lines.logprobs[4] == -np.inf and lines.ranks[4] == 100
    assert lines.ranks[5] > 0 and np.isfinite(lines.top_logprobs[5]).all()


def test_each_line_has_its_own_number_of_rivals() -> None:
    rng = np.random.default_rng(4)
    logits = make_rows("normal", 2, 100, rng)
    rows, tokens = np.array([1, 1, 0, 1], np.int32), np.array([3, 4, 5, 6], np.int32)
    lines = logprob_rows(logits, rows, tokens, np.array([0, -1, 3, 1], np.int32))
    full = token_logprobs(logits[rows], tokens, 3)
    assert lines.top_ids.shape == (4, 3)
    np.testing.assert_array_equal(lines.ranks, [full.ranks[0], 0, full.ranks[2], full.ranks[3]])
    np.testing.assert_array_equal((lines.top_ids >= 0).sum(axis=1), [0, 0, 3, 1])
    np.testing.assert_array_equal(lines.top_ids[2], full.top_ids[2])
    np.testing.assert_array_equal(np.isnan(lines.top_logprobs), lines.top_ids < 0)


def test_no_rows() -> None:
    empty = np.empty(0, np.int32)
    lines = token_logprobs(np.empty((0, 10), np.float32), empty, 5)
    assert len(lines.logprobs) == 0 and len(lines.top_ids) == 0


def test_bits_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(5)
    logits = make_rows("normal", 37, 2999, rng)
    token_ids = rng.integers(0, 2999, 37).astype(np.int32)
    together = token_logprobs(logits, token_ids, 4)
    alone = [token_logprobs(logits[i : i + 1], token_ids[i : i + 1], 4) for i in range(37)]
    num_threads = kernels.get_num_threads()
    kernels.set_num_threads(1)
    try:
        serial = token_logprobs(logits, token_ids, 4)
    finally:
        kernels.set_num_threads(num_threads)
    for column, single, one_thread in zip(together, zip(*alone), serial):
        np.testing.assert_array_equal(np.concatenate(single), column)
        np.testing.assert_array_equal(one_thread, column)
