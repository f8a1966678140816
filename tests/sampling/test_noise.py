"""The noise: Philox against published vectors and NumPy's, keys, moments, tail, independence."""

from __future__ import annotations

import numpy as np
import pytest

from batchwright.sampling.noise import (
    HIGH_DOMAIN,
    LOW_DOMAIN,
    MAX_NOISE,
    gumbel_from_words,
    gumbel_noise,
    noise_key,
    noise_words,
    philox4x32,
)

# Random123 1.14, tests/kat_vectors, the lines "philox4x32 10": counter, key, words.
KNOWN_ANSWERS = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def philox4(counter: list[int], key: list[int], bits: int) -> list[int]:
    """Philox4 of 32 or 64 bit words in Python integers, written from the paper's figure."""
    multipliers = {
        32: (0xD2511F53, 0xCD9E8D57),
        64: (0xD2E7470EE14C6C93, 0xCA5A826395121157),
    }[bits]
    weyl = {32: (0x9E3779B9, 0xBB67AE85), 64: (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)}[bits]
    mask = 2**bits - 1
    x, k = list(counter), list(key)
    for _ in range(10):
        low = [x[0] * multipliers[0] & mask, x[2] * multipliers[1] & mask]
        high = [x[0] * multipliers[0] >> bits, x[2] * multipliers[1] >> bits]
        x = [high[1] ^ x[1] ^ k[0], low[1], high[0] ^ x[3] ^ k[1], low[0]]
        k = [(k[0] + weyl[0]) & mask, (k[1] + weyl[1]) & mask]
    return x


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(expected))


def test_philox_equals_the_construction_that_numpy_uses() -> None:
    """NumPy has the 64-bit Philox: it pins the construction, which then pins our 32-bit one."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        counter, key = (rng.integers(0, 2**64, n, np.uint64) for n in (4, 2))
        numpy_words = np.random.Philox(counter=counter, key=key).random_raw(4)
        after_increment = [int(counter[0]) + 1, *map(int, counter[1:])]  # NumPy counts first
        assert philox4(after_increment, list(map(int, key)), 64) == numpy_words.tolist()
        counter, key = (rng.integers(0, 2**32, n, np.uint32) for n in (4, 2))
        expected = philox4(counter.tolist(), key.tolist(), 32)
        assert philox4x32(counter, key).tolist() == expected


def test_words_follow_the_documented_counter() -> None:
    key, sample_index, position, token = 0x0123456789ABCDEF, 3, 17, 4 * 11 + 2
    counter = np.array([11, position, sample_index, LOW_DOMAIN], np.uint32)
    block = philox4x32(counter, np.array([0x89ABCDEF, 0x01234567], np.uint32))
    got = noise_words(key, sample_index, position, np.array([token], np.int32), LOW_DOMAIN)
    assert got[0] == block[2]


def test_keys_are_pinned() -> None:
    """Results of old jobs must stay reproducible: these numbers may never change."""
    assert noise_key(7, 0, "a") == 10582831001977266170
    assert noise_key(None, 7, "a") == 18144569168189531313


def test_a_seed_overrides_the_job_and_the_id() -> None:
    assert noise_key(7, 0, "a") == noise_key(7, 1, "b")
    assert noise_key(None, 0, "a") != noise_key(None, 0, "b")
    assert noise_key(None, 0, "a") != noise_key(None, 1, "a")


def test_keys_do_not_collide_across_kinds_or_by_concatenation() -> None:
    keys = {noise_key(seed, 0, "") for seed in range(-500, 500)}
    keys |= {noise_key(None, job, str(row)) for job in range(10) for row in range(100)}
    keys |= {noise_key(None, 1, "1:1"), noise_key(None, 11, ":1"), noise_key(2**70, 0, "")}
    assert len(keys) == 1000 + 1000 + 3
    assert all(0 <= key < 2**64 for key in keys)


def test_ids_that_are_not_valid_unicode_have_keys() -> None:
    assert noise_key(None, 0, "\ud800") != noise_key(None, 0, "\ud801")


def test_moments_are_those_of_a_standard_gumbel() -> None:
    noise = gumbel_noise(noise_key(1, 0, ""), 0, 0, np.arange(200_000, dtype=np.int32))
    # Standard errors: 0.0029 for the mean (0.5772), 0.0077 for the variance (pi^2 / 6).
    assert abs(noise.mean() - np.euler_gamma) < 0.012
    assert abs(noise.var() - np.pi**2 / 6) < 0.03
    # Quantiles: P(G <= x) = exp(-exp(-x)).
    for x in (-1.0, 0.0, 1.0, 3.0, 6.0):
        expected = np.exp(-np.exp(-x))
        error = np.sqrt(expected * (1 - expected) / len(noise))
        assert abs((noise <= x).mean() - expected) < 4 * error


def test_neighbouring_arguments_are_independent() -> None:
    tokens = np.arange(100_000, dtype=np.int32)
    base = gumbel_noise(5, 0, 0, tokens)
    others = {
        "key": gumbel_noise(6, 0, 0, tokens),
        "sample": gumbel_noise(5, 1, 0, tokens),
        "position": gumbel_noise(5, 0, 1, tokens),
        "token": np.roll(base, 1),
        "block": np.roll(base, 4),
        "sample against position": gumbel_noise(5, 1, 0, tokens) - gumbel_noise(5, 0, 1, tokens),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.015, name  # standard error 0.003


def test_the_two_domains_are_different_words() -> None:
    tokens = np.arange(1000, dtype=np.int32)
    high = noise_words(5, 0, 0, tokens, HIGH_DOMAIN)
    low = noise_words(5, 0, 0, tokens, LOW_DOMAIN)
    assert (high != low).all()


def test_the_range_of_the_noise() -> None:
    extremes = np.array([0, 2**32 - 1], np.uint32)
    largest, smallest = gumbel_from_words(extremes, extremes)
    assert largest == pytest.approx(65 * np.log(2)) and largest < MAX_NOISE
    assert smallest == pytest.approx(-np.log(53 * np.log(2)))
    assert np.isfinite([largest, smallest]).all()


def test_resolution_in_the_tail() -> None:
    """Neighbouring high words near the tail leave room for 2^32 values between them."""
    high = np.array([0, 0, 1], np.uint32)
    low = np.array([2**31, 2**31 + 2**10, 2**31], np.uint32)
    noise = gumbel_from_words(high, low)
    assert noise[0] > noise[1] > noise[2]


def test_noise_beyond_the_cap_of_24_and_32_bit_uniforms_occurs() -> None:
    """Found by searching 3e10 draws; 24-bit uniforms end at 16.6, 32-bit ones at 22.9."""
    noise = gumbel_noise(noise_key(38, 0, ""), 0, 26919, np.array([33341], np.int32))
    assert noise[0] == pytest.approx(25.56002081, abs=1e-8)
