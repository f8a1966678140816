"""What every length predictor promises, and what each finds in families of rows."""

from __future__ import annotations

import time

import numpy as np
import pytest

from batchwright.errors import ConfigError
from batchwright.plan.expected_lengths import FIRST_ENDED, MOST_NEW, ExpectedLengths, is_certain
from batchwright.plan.length_predictor import Lengths, Rows, find_predictor, within_limits
from batchwright.plan.lengths.buckets import bucket_of, upper_edge
from batchwright.request import FinishReason, Request, SamplingParams
from batchwright.sequence import Sequence
from batchwright.techniques import names

PREDICTORS = names("plan.lengths")
LEARNING = [name for name in PREDICTORS if name not in ("declared", "self_report")]
MEANS = (5, 60, 200, 380)


def family_rows(num_rows: int, seed: int = 1) -> tuple[Rows, np.ndarray]:
    """Rows of four families; those of one share 20 tokens and are about equally long."""
    random = np.random.default_rng(seed)
    family = random.integers(0, 4, num_rows)
    prompts = [
        np.concatenate((np.full(20, 50 + f), random.integers(100, 999, random.integers(3, 30))))
        for f in family.tolist()
    ]
    output = np.rint(np.array(MEANS)[family] * random.uniform(0.9, 1.1, num_rows))
    rows = Rows([prompt.astype(np.int32) for prompt in prompts], np.full(num_rows, 500))
    return rows, output.astype(np.int64)


def absolute_error(lengths: Lengths, truth: np.ndarray) -> float:
    return float(np.abs(lengths.mean - truth).mean())


@pytest.mark.parametrize("name", PREDICTORS)
def test_who_knows_nothing_says_all_that_rows_may(name: str) -> None:
    rows, _ = family_rows(5)
    lengths = find_predictor(name).predict(rows, np.zeros(5, np.int64))
    assert lengths.mean.tolist() == lengths.upper.tolist() == [500.0] * 5


@pytest.mark.parametrize("name", LEARNING)
def test_known_rows_are_better_than_the_limit(name: str) -> None:
    """History knows no families, so it can only find the mean of all."""
    predictor = find_predictor(name)
    predictor.learn(*family_rows(400))
    rows, truth = family_rows(200, seed=2)
    lengths = predictor.predict(rows, np.zeros(200, np.int64))
    error = absolute_error(within_limits(lengths, np.ones_like(rows.most), rows.most), truth)
    assert error < {"history": 150, "subtree": 20, "buckets": 60}[name]
    assert absolute_error(Lengths(rows.most, rows.most), truth) > 300
    assert (truth <= lengths.upper + 1).mean() > 0.75


@pytest.mark.parametrize("name", LEARNING)
def test_what_is_said_of_one_row_does_not_depend_on_the_others(name: str) -> None:
    predictor = find_predictor(name)
    predictor.learn(*family_rows(200))
    rows, _ = family_rows(30, seed=2)
    zeros = np.zeros(30, np.int64)
    together = predictor.predict(rows, zeros).mean
    alone = [
        predictor.predict(Rows([prompt], rows.most[:1]), zeros[:1]).mean[0]
        for prompt in rows.prompts
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-4)


@pytest.mark.parametrize("name", LEARNING)
def test_guessing_costs_little(name: str) -> None:
    """Under a millisecond a row, however slow the machine; benchmarks/lengths.py says how much."""
    predictor = find_predictor(name)
    rows, output = family_rows(1000)
    predictor.predict(rows, output * 0)
    predictor.learn(rows, output)
    predictor.predict(rows, output * 0)  # compiles
    start_s = time.process_time()
    predictor.predict(rows, output * 0)
    assert time.process_time() - start_s < 1.0


def test_rows_that_end_first_are_not_taken_for_all() -> None:
    """Of 40 alike rows the first ten have ended with 5 tokens, the others go on."""
    predictor = find_predictor("subtree")
    prompt = np.arange(10, dtype=np.int32)
    predictor.learn(Rows([prompt] * 10, np.full(10, 500)), np.full(10, 5))
    running = Rows([prompt] * 30, np.full(30, 500))
    few = predictor.predict(running, np.full(30, 5)).mean
    many = predictor.predict(running, np.full(30, 100)).mean
    assert few[0] == (10 * 5 + 30 * 5) / 10 and many[0] == (10 * 5 + 30 * 100) / 10


def test_history_compares_with_rows_that_went_on() -> None:
    predictor = find_predictor("history")
    rows = Rows([np.zeros(1, np.int32)] * 100, np.full(100, 640))
    predictor.learn(rows, np.repeat([10, 320], 50))
    new, old = predictor.predict(
        Rows(rows.prompts[:2], rows.most[:2]), np.array([0, 50])
    ).mean.tolist()
    assert new == pytest.approx(160, abs=15) and old == pytest.approx(320, abs=10)


def test_a_length_on_a_border_belongs_to_the_bucket_below() -> None:
    most = np.full(4, 500)
    assert bucket_of(np.array([50, 51, 1, 500]), most).tolist() == [0, 1, 0, 9]
    buckets = bucket_of(np.array([50, 51]), most[:2])
    assert upper_edge(buckets, most[:2]).tolist() == [50, 100]


def test_an_unknown_predictor_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no plan\.lengths called 'crystal_ball'"):
        find_predictor("crystal_ball")


def sequence_of(index: int, prompt: np.ndarray, num_output: int = 0, **params) -> Sequence:
    settings = SamplingParams(max_tokens=100, **params)
    request = Request(id=str(index), prompt_token_ids=prompt.astype(np.int32), params=settings)
    return Sequence(
        request=request,
        order=index,
        sample_index=0,
        end_token_ids=(),
        noise_key=0,
        max_len=len(prompt) + 100,
        token_ids=np.zeros(len(prompt) + num_output, np.int32),
    )


def ended(index: int, prompt: np.ndarray, num_output: int, **params) -> Sequence:
    sequence = sequence_of(index, prompt, num_output, **params)
    sequence.finish_reason = FinishReason.STOP
    return sequence


def test_expectations_follow_what_has_ended() -> None:
    expected = ExpectedLengths(find_predictor("subtree"))
    prompt = np.arange(8)
    waiting = sequence_of(0, prompt)
    expected.estimate([waiting])
    assert (waiting.expected_output, waiting.expected_len) == (100, 108)
    for index in range(FIRST_ENDED):
        assert not expected.is_due
        expected.note_end(ended(index, prompt, 20))
    assert expected.is_due and expected.num_ended == FIRST_ENDED
    expected.estimate([waiting])
    assert (waiting.expected_output, waiting.expected_len) == (20, 28)
    assert not expected.is_due


def test_what_is_certain_is_not_guessed() -> None:
    """Rows that cannot end early; they teach nothing either."""
    expected = ExpectedLengths(find_predictor("subtree"))
    prompt = np.arange(8)
    for index in range(50):
        expected.note_end(ended(index, prompt, 20))
    fixed = sequence_of(0, prompt, ignore_eos=True)
    at_least = sequence_of(1, prompt, min_tokens=60)
    expected.estimate([fixed, at_least])
    assert is_certain(fixed) and fixed.expected_len == fixed.max_len
    assert at_least.expected_output == 60
    before = expected.num_ended
    expected.note_end(ended(2, prompt, 100, ignore_eos=True))
    cancelled = ended(3, prompt, 3)
    cancelled.finish_reason = FinishReason.CANCELLED
    expected.note_end(cancelled)
    assert expected.num_ended == before


def test_a_row_that_has_outgrown_its_like_keeps_what_is_expected_of_it() -> None:
    expected = ExpectedLengths(find_predictor("subtree"))
    prompt = np.arange(8)
    for index in range(20):
        expected.note_end(ended(index, prompt, 20))
    long = sequence_of(0, prompt, num_output=40)
    long.expected_len = 88
    expected.estimate([long])
    assert long.expected_len == 88 and long.expected_output >= 40


def test_what_nobody_asks_for_is_forgotten() -> None:
    expected = ExpectedLengths(find_predictor("declared"))
    for index in range(2 * MOST_NEW):
        expected.note_end(ended(index, np.arange(2), 5))
    assert len(expected._ended) == MOST_NEW and expected.is_due
