"""The fast sampling kernel: same tokens as its naive twin, same bits in every batch."""

from __future__ import annotations

import numpy as np
import pytest

from batchwright import kernels
from batchwright.kernels.sample import naive
from batchwright.kernels.sample.numba import argmax_rows
from batchwright.sampling.noise import gumbel_noise, noise_key
from tests.kernels.sample_case import (
    KINDS,
    draw_fast,
    draw_naive,
    make_rows,
    make_slots,
    mixed_slots,
)


def positions_of(num: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2000, num).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 3, 63, 64, 65, 777, 5000])
def test_draws_equal_the_naive_twin(kind: str, vocab_size: int) -> None:
    rng = np.random.default_rng([KINDS.index(kind), vocab_size])
    num = 120
    logits, slots = make_rows(kind, num, vocab_size, rng), mixed_slots(num, rng)
    positions = positions_of(num, rng)
    np.testing.assert_array_equal(
        draw_fast(logits, slots, positions), draw_naive(logits, slots, positions)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_draws_equal_the_naive_twin_at_full_width(kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    logits, slots = make_rows(kind, 12, 49_152, rng), mixed_slots(12, rng)
    positions = positions_of(12, rng)
    np.testing.assert_array_equal(
        draw_fast(logits, slots, positions), draw_naive(logits, slots, positions)
    )


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["normal", "ties", "zipf", "masked"])
def test_nucleus_edge_is_the_twins_to_the_token(kind: str, top_p: float) -> None:
    """At a high temperature of the draw alone every kept token is likely: the sets are compared.

    The filters see temperature 1 in both; the row is drawn many times.
    """
    rng = np.random.default_rng([9, KINDS.index(kind)])
    row = make_rows(kind, 1, 300, rng)
    kept = naive.kept_tokens(row[0], temperature=1.0, top_k=0, top_p=top_p, min_p=0.0)
    num = 30_000
    slots = make_slots(num, rng, top_p=top_p)
    rows = np.zeros(num, np.int32)
    drawn = np.unique(draw_fast(row, slots, np.arange(num, dtype=np.int32), rows=rows))
    assert kept[drawn].all()
    probability = np.where(kept, np.exp(row[0].astype(np.float64)), 0)
    expected_often = np.flatnonzero(probability / probability.sum() * num > 25)
    assert np.isin(expected_often, drawn).all()


def test_the_comparison_with_the_twin_can_fail() -> None:
    """Negative control: the filters in another order draw other tokens."""
    rng = np.random.default_rng(0)
    logits = make_rows("normal", 200, 300, rng)
    slots, positions = (
        make_slots(200, rng, top_k=20, top_p=0.8, temperature=1.5),
        positions_of(200, rng),
    )
    same = draw_fast(logits, slots, positions)
    np.testing.assert_array_equal(same, draw_naive(logits, slots, positions))
    wrong = []  # top_p before top_k, on probabilities before temperature
    for row, slot, position in zip(logits, slots, positions):
        kept = naive.kept_tokens(row, temperature=1.0, top_k=0, top_p=0.8, min_p=0.0)
        cut = np.where(kept, row, -np.inf).astype(np.float32)
        wrong.append(
            naive.draw_token(
                cut,
                temperature=1.5,
                top_k=20,
                noise_key=int(slot["noise_key"]),
                sample_index=int(slot["sample_index"]),
                output_position=int(position),
            )
        )
    assert (same != np.array(wrong)).sum() > 10


def test_no_draw_depends_on_its_batch() -> None:
    rng = np.random.default_rng(1)
    num = 64
    logits = np.concatenate([make_rows(kind, 16, 3000, rng) for kind in KINDS[:4]])
    slots, positions = mixed_slots(num, rng), positions_of(num, rng)
    together = draw_fast(logits, slots, positions)
    order = rng.permutation(num)
    np.testing.assert_array_equal(
        draw_fast(logits[order], slots[order], positions[order]), together[order]
    )
    alone = [
        draw_fast(logits[i : i + 1], slots[i : i + 1], positions[i : i + 1])[0] for i in range(num)
    ]
    np.testing.assert_array_equal(alone, together)


def test_no_draw_depends_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(2)
    logits, slots = make_rows("normal", 33, 3000, rng), mixed_slots(33, rng)
    positions = positions_of(33, rng)
    many = draw_fast(logits, slots, positions)
    num_threads = kernels.get_num_threads()
    kernels.set_num_threads(1)
    try:
        one = draw_fast(logits, slots, positions)
    finally:
        kernels.set_num_threads(num_threads)
    np.testing.assert_array_equal(one, many)


def test_the_address_of_a_row_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    row = make_rows("zipf", 1, 1003, rng)
    slots, positions = make_slots(1, rng, top_p=0.9), np.zeros(1, np.int32)
    expected = draw_fast(row, slots, positions)
    for shift in range(9):
        shifted = np.empty(row.size + 16, np.float32)[shift : shift + row.size].reshape(1, -1)
        shifted[:] = row
        np.testing.assert_array_equal(draw_fast(shifted, slots, positions), expected)


def test_logits_are_left_alone_and_may_be_read_only() -> None:
    rng = np.random.default_rng(4)
    logits = make_rows("normal", 4, 100, rng)
    before = logits.copy()
    logits.flags.writeable = False
    slots = make_slots(4, rng, num_biased=1, top_k=5)
    draw_fast(logits, slots, np.zeros(4, np.int32), bias_values=np.full((4, 1), 9, np.float32))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_sound_give_minus_one(temperature: float) -> None:
    rng = np.random.default_rng(5)
    logits = make_rows("normal", 8, 130, rng)
    negative_nan = np.array([0xFFC00000], np.uint32).view(np.float32)[0]
    logits[1, 0] = np.nan
    logits[2, 129] = negative_nan  # what x86 makes of 0 / 0
    logits[3] = -np.inf
    logits[4, 64] = np.inf
    logits[5, :129] = -np.inf  # one token left: sound
    logits[6] = np.nan
    slots = make_slots(8, rng, temperature=temperature, top_p=0.9, top_k=7, min_p=0.1)
    tokens = draw_fast(logits, slots, np.zeros(8, np.int32))
    np.testing.assert_array_equal(tokens == -1, [False, True, True, True, True, False, True, False])
    assert tokens[5] == 129
    np.testing.assert_array_equal(tokens, draw_naive(logits, slots, np.zeros(8, np.int32)))
    np.testing.assert_array_equal(
        argmax_rows(logits, np.arange(8, dtype=np.int32)) == -1, tokens == -1
    )


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = np.zeros((3, 200), np.float32)
    logits[0, [70, 150]] = 5.0
    logits[1] = -0.0
    logits[1, 100:] = 0.0  # equal to -0.0
    logits[2, 199] = 1e-30
    expected = [70, 0, 199]
    np.testing.assert_array_equal(argmax_rows(logits, np.arange(3, dtype=np.int32)), expected)
    np.testing.assert_array_equal(
        argmax_rows(logits, np.array([2, 0, 2], np.int32)), [199, 70, 199]
    )
    slots = make_slots(3, np.random.default_rng(0), temperature=0)
    np.testing.assert_array_equal(draw_fast(logits, slots, np.zeros(3, np.int32)), expected)


def drawn_set(row: np.ndarray, num: int = 4000, **fields: float) -> set[int]:
    slots = make_slots(num, np.random.default_rng(6), **fields)
    positions = np.arange(num, dtype=np.int32)
    rows = np.zeros(num, np.int32)
    return set(draw_fast(row[None], slots, positions, rows=rows).tolist())


def test_ties() -> None:
    """top_k keeps all that tie with the k-th; top_p cuts ties by id, min_p keeps equals."""
    row = np.array([1.0, 2.0, 0.5, 1.0, 1.0, 0.0], np.float32)
    assert drawn_set(row, top_k=2) == {0, 1, 3, 4}
    assert drawn_set(row, top_k=1) == {1}
    flat = np.zeros(10, np.float32)
    assert drawn_set(flat, top_p=0.3) == {0, 1, 2}  # exactly reached
    assert drawn_set(flat, top_p=0.31) == {0, 1, 2, 3}
    assert drawn_set(flat, top_p=0.0) == {0}
    assert drawn_set(row, min_p=1.0) == {1}
    assert drawn_set(flat, min_p=1.0) == set(range(10))


def test_a_target_that_is_reached_exactly_needs_no_further_token() -> None:
    """Also among tokens so close that the histogram cannot tell them apart."""
    row = (np.arange(12)[::-1] * np.float32(1e-5)).astype(np.float32)
    mass = np.cumsum(naive.weights(row, 1.0).astype(np.float64))
    num_exact = 0
    for num_kept in range(1, 12):
        top_p = float(mass[num_kept - 1] / mass[-1])
        if top_p * mass[-1] == mass[num_kept - 1]:
            num_exact += 1
            assert drawn_set(row, num=1000, top_p=top_p) == set(range(num_kept))
    assert num_exact > 5


def test_allowed_tokens() -> None:
    rng = np.random.default_rng(7)
    num, vocab_size = 50, 333
    logits, slots = make_rows("normal", num, vocab_size, rng), mixed_slots(num, rng)
    positions = positions_of(num, rng)
    may = rng.random((num, vocab_size)) < 0.05
    may[:, 3] = True
    may[0] = False
    bits = np.zeros((num, -(-vocab_size // 32) * 32), np.bool_)
    bits[:, :vocab_size] = may
    allowed = np.packbits(bits, axis=1, bitorder="little").view("<u4")
    tokens = draw_fast(logits, slots, positions, allowed=allowed)
    masked = np.where(may, logits, -np.inf).astype(np.float32)
    np.testing.assert_array_equal(tokens, draw_naive(masked, slots, positions))
    assert tokens[0] == -1 and may[np.arange(1, num), tokens[1:]].all()


def test_draws_name_their_masks() -> None:
    rng = np.random.default_rng(17)
    num, vocab_size = 40, 333
    logits, slots = make_rows("normal", num, vocab_size, rng), mixed_slots(num, rng)
    slots["temperature"][::4] = 0.0
    positions = positions_of(num, rng)
    may = rng.random((3, vocab_size)) < 0.1
    may[2, 32:300] = True  # whole words
    bits = np.zeros((3, 384), np.bool_)  # masks may be wider than the vocabulary
    bits[:, :vocab_size] = may
    bits[:, vocab_size:] = True
    allowed = np.packbits(bits, axis=1, bitorder="little").view("<u4")
    lines = rng.integers(-1, 3, num).astype(np.int32)
    tokens = draw_fast(logits, slots, positions, allowed=allowed, mask_of_sample=lines)
    free = (lines < 0)[:, None]
    masked = np.where(free | may[lines], logits, -np.inf).astype(np.float32)
    np.testing.assert_array_equal(tokens, draw_naive(masked, slots, positions))
    unmasked = draw_fast(logits, slots, positions)
    assert (tokens[lines < 0] == unmasked[lines < 0]).all()
    assert (tokens != unmasked).sum() > 10  # the masks matter


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_penalties_and_suppression_equal_the_naive_twin(temperature: float) -> None:
    rng = np.random.default_rng(8)
    num, vocab_size = 300, 50
    logits = make_rows("normal", num, vocab_size, rng)
    slots = make_slots(
        num,
        rng,
        temperature=temperature,
        repetition_penalty=rng.choice([1.0, 1.3, 0.7], num),
        frequency_penalty=rng.choice([0.0, 0.4, -0.3], num),
        presence_penalty=rng.choice([0.0, 0.6, -0.5], num),
        num_biased=rng.integers(0, 4, num),
        num_suppressed=rng.integers(0, 3, num),
        min_tokens=rng.integers(0, 30, num),
        num_prompt_tokens=20,
        num_tokens=rng.integers(20, 40, num),
    )
    history = rng.integers(0, vocab_size, (num, 40)).astype(np.int32)
    history[::7, 25] = -1  # a failed draw is kept in the history and ignored
    bias_ids = np.argsort(rng.random((num, vocab_size)), axis=1)[:, :4].astype(np.int32)
    bias_values = rng.normal(0, 3, (num, 4)).astype(np.float32)
    suppressed_ids = np.argsort(rng.random((num, vocab_size)), axis=1)[:, :3].astype(np.int32)
    positions = rng.integers(0, 30, num).astype(np.int32)
    adjusted = np.stack(
        [
            naive.adjust_logits(
                logits[i],
                bias={
                    int(token): float(value)
                    for token, value in zip(
                        bias_ids[i, : slot["num_biased"]], bias_values[i, : slot["num_biased"]]
                    )
                },
                prompt_ids=history[i, :20],
                output_ids=(ids := history[i, 20 : slot["num_tokens"]])[ids >= 0],
                repetition_penalty=float(slot["repetition_penalty"]),
                frequency_penalty=float(slot["frequency_penalty"]),
                presence_penalty=float(slot["presence_penalty"]),
                suppressed_ids=tuple(suppressed_ids[i, : slot["num_suppressed"]])
                if positions[i] < slot["min_tokens"]
                else (),
            )
            for i, slot in enumerate(slots)
        ]
    )
    tokens = draw_fast(
        logits,
        slots,
        positions,
        bias_ids=bias_ids,
        bias_values=bias_values,
        suppressed_ids=suppressed_ids,
        history=history,
    )
    np.testing.assert_array_equal(tokens, draw_naive(adjusted, slots, positions))
    assert (tokens != draw_naive(logits, slots, positions)).sum() > 50  # it did matter


def test_token_counts_are_clean_after_every_draw() -> None:
    """A row with penalties leaves nothing behind for the next row of its thread."""
    rng = np.random.default_rng(9)
    num = 20
    logits = np.repeat(make_rows("normal", 1, 40, rng), num, axis=0)
    slots = make_slots(
        num, rng, temperature=0, presence_penalty=2.0, num_prompt_tokens=1, num_tokens=3
    )
    slots[1:] = slots[0]
    history = np.tile(np.array([1, 2, 2], np.int32), (num, 1))
    tokens = draw_fast(logits, slots, np.zeros(num, np.int32), history=history)
    assert len(set(tokens.tolist())) == 1


def test_noise_beyond_the_cap_of_32_bit_uniforms_draws_its_token() -> None:
    """A token of probability 4e-11 is drawn where its noise is 25.56 (see test_noise)."""
    logits = np.full((1, 49_152), -60.0, np.float32)
    logits[0, 0], logits[0, 33341] = 0.0, -23.9
    slots = make_slots(2, np.random.default_rng(0), sample_index=0, noise_key=noise_key(38, 0, ""))
    positions = np.array([26919, 26918], np.int32)
    tokens = draw_fast(logits, slots, positions, rows=np.zeros(2, np.int32))
    np.testing.assert_array_equal(tokens, [33341, 0])


def test_the_draw_is_the_argmax_of_logits_plus_noise() -> None:
    """Against nothing but the definition: no filters, temperature 1."""
    rng = np.random.default_rng(10)
    logits = make_rows("normal", 20, 1000, rng)
    slots, positions = make_slots(20, rng), positions_of(20, rng)
    tokens = np.arange(1000, dtype=np.int32)
    expected = [
        np.argmax(
            row.astype(np.float64)
            + gumbel_noise(int(slot["noise_key"]), int(slot["sample_index"]), int(t), tokens)
        )
        for row, slot, t in zip(logits, slots, positions)
    ]
    np.testing.assert_array_equal(draw_fast(logits, slots, positions), expected)
