"""Draws follow the distribution that transformers' processors define, and are independent.

Seeds are fixed, so the outcomes are too. A chi-square statistic with df degrees of freedom has mean
df and variance 2 df; the bound below is exceeded by chance once in about 10^6 tests.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchwright.kernels.sample import naive
from tests.kernels.sample_case import draw_fast, make_slots

pytestmark = pytest.mark.cpu

NUM_DRAWS = 200_000
LOGITS = np.array([2.1, -0.4, 1.3, 0.0, 1.25, -2.0, 0.7, 0.6, -1.1, 1.9, -3.0, 0.1], np.float32)
CASES = {
    "temperature 1": {},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "temperature, top_k, top_p": {"temperature": 1.5, "top_k": 7, "top_p": 0.85},
    "all": {"temperature": 1.7, "top_k": 9, "top_p": 0.95, "min_p": 0.15},
}


def warped(
    row: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    order: str = "tkpm",
) -> torch.Tensor:
    """The row after transformers' warpers (float64), in its own order unless told otherwise."""
    warpers = {
        "t": TemperatureLogitsWarper(temperature),
        "k": TopKLogitsWarper(top_k) if top_k else None,
        "p": TopPLogitsWarper(top_p) if top_p < 1 else None,
        "m": MinPLogitsWarper(min_p) if min_p else None,
    }
    scores = torch.from_numpy(row).double()[None]
    for letter in order:
        warper = warpers[letter]
        if warper is not None:
            scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    return scores[0]


def probabilities(**options: float | str) -> np.ndarray:
    return warped(LOGITS, **options).softmax(-1).numpy()


def counts(seed: int = 0, sample_index: int = 0, **fields: float) -> np.ndarray:
    return np.bincount(draws(seed, sample_index, **fields), minlength=len(LOGITS))


@functools.cache
def draws(seed: int = 0, sample_index: int = 0, **fields: float) -> np.ndarray:
    """NUM_DRAWS tokens of one sequence, one per position, from the same logits."""
    slots = make_slots(1, np.random.default_rng(seed), **fields)
    slots["sample_index"] = sample_index
    return draw_fast(
        LOGITS[None],
        np.repeat(slots, NUM_DRAWS),
        np.arange(NUM_DRAWS, dtype=np.int32),
        rows=np.zeros(NUM_DRAWS, np.int32),
    )


def chi_square(observed: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(statistic, bound); cells that cannot occur must not have occurred."""
    possible = expected > 0
    assert observed[~possible].sum() == 0
    observed, expected = observed[possible], expected[possible]
    df = len(expected) - 1
    return float(((observed - expected) ** 2 / expected).sum()), df + 5 * np.sqrt(2 * df) + 15


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name: str) -> None:
    statistic, bound = chi_square(counts(**CASES[name]), NUM_DRAWS * probabilities(**CASES[name]))
    assert statistic < bound


@pytest.mark.parametrize(
    "options, wrong",
    [
        ({"temperature": 1.5}, {"temperature": 1.43}),
        ({"top_p": 0.8}, {"top_p": 0.8, "temperature": 0.95}),
    ],
)
def test_the_bound_detects_a_small_error(options: dict, wrong: dict) -> None:
    """Negative control: a temperature wrong by 5 % is far outside."""
    statistic, bound = chi_square(counts(**options), NUM_DRAWS * probabilities(**wrong))
    assert statistic > 2 * bound


def test_the_order_of_filters_matters_and_is_that_of_transformers() -> None:
    """Negative control: top_p before temperature keeps another set."""
    options = {"temperature": 2.5, "top_p": 0.7}
    kept = set(np.flatnonzero(counts(**options)))
    assert kept == set(np.flatnonzero(probabilities(**options)))
    assert kept != set(np.flatnonzero(probabilities(**options, order="pt")))
    options = {"top_k": 5, "top_p": 0.8}
    kept = set(np.flatnonzero(counts(**options)))
    assert kept == set(np.flatnonzero(probabilities(**options)))
    assert kept != set(np.flatnonzero(probabilities(**options, order="tpkm")))


@pytest.mark.parametrize("other", ["sample index", "position", "key", "position of another sample"])
def test_draws_are_independent(other: str) -> None:
    """Contingency table of pairs against the product of the exact distributions."""
    first = draws()
    second = {
        "sample index": draws(sample_index=1),
        "position": np.roll(first, 1),
        "key": draws(seed=1),
        "position of another sample": np.roll(draws(sample_index=1), 1),
    }[other]
    table = np.bincount(first * len(LOGITS) + second, minlength=len(LOGITS) ** 2)
    p = probabilities()
    statistic, bound = chi_square(table, NUM_DRAWS * np.outer(p, p).ravel())
    assert statistic < bound


def test_dependent_draws_are_found_out() -> None:
    """Negative control: one pair in fifty is a copy."""
    first, second = draws(), draws(sample_index=1).copy()
    second[::50] = first[::50]
    table = np.bincount(first * len(LOGITS) + second, minlength=len(LOGITS) ** 2)
    p = probabilities()
    statistic, bound = chi_square(table, NUM_DRAWS * np.outer(p, p).ravel())
    assert statistic > bound


@pytest.mark.parametrize("seed", range(6))
def test_kept_tokens_are_those_of_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        row = (rng.choice([0.5, 2, 6]) * rng.standard_normal(rng.integers(2, 400))).astype(
            np.float32
        )
        options = {
            "temperature": float(rng.choice([0.3, 1.0, 2.0])),
            "top_k": int(rng.choice([0, 1, 5, 40])),
            "top_p": float(rng.choice([1.0, 0.95, 0.6, 0.1])),
            "min_p": float(rng.choice([0.0, 0.02, 0.3])),
        }
        expected = torch.isfinite(warped(row, **options)).numpy()
        np.testing.assert_array_equal(naive.kept_tokens(row, **options), expected)


def test_ties_of_top_k_are_kept_as_transformers_keeps_them() -> None:
    row = np.array([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], np.float32)
    kept = naive.kept_tokens(row, temperature=1.0, top_k=2, top_p=1.0, min_p=0.0)
    np.testing.assert_array_equal(kept, torch.isfinite(warped(row, top_k=2)).numpy())
    assert kept.sum() == 4


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    rng = np.random.default_rng(3)
    row = (3 * rng.standard_normal(200)).astype(np.float32)
    prompt, output = (rng.integers(0, 200, n).astype(np.int32) for n in (30, 20))
    got = naive.adjust_logits(
        row, bias={}, prompt_ids=prompt, output_ids=output, repetition_penalty=penalty
    )
    ids = torch.from_numpy(np.concatenate([prompt, output]).astype(np.int64))[None]
    reference = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(row)[None])
    np.testing.assert_array_equal(got, reference[0].numpy())


def test_presence_and_frequency_penalties_are_those_of_the_openai_formula() -> None:
    """mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence, c over the output alone."""
    row = np.linspace(-1, 1, 6).astype(np.float32)
    got = naive.adjust_logits(
        row,
        bias={5: -2.0},
        prompt_ids=np.array([0, 0, 1], np.int32),
        output_ids=np.array([2, 3, 2, 2], np.int32),
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    np.testing.assert_allclose(got - row, [0, 0, -1.75, -0.75, 0, -2.0], atol=1e-6)
