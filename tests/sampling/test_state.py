"""SamplingState: parameters per slot, preemption, forks, penalties, log-probabilities, errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from batchwright.errors import RequestError, ShapeError
from batchwright.kernels.sample import naive
from batchwright.kernels.sample.rowmath import MAX_VOCAB_SIZE
from batchwright.request import SamplingParams
from batchwright.sampling.noise import noise_key
from batchwright.sampling.state import SamplingState
from batchwright.step import NewSequence

VOCAB_SIZE = 90
PROMPT = [3, 1, 4, 1, 5]


def append_many(state: SamplingState, num: int) -> None:
    for token_id in range(num):
        state.append(ints(0), ints(token_id))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def make_state(max_num_seqs: int = 8) -> SamplingState:
    return SamplingState(max_num_seqs, max_model_len=64, vocab_size=VOCAB_SIZE)


def sequence(slot: int, output: list[int] | None = None, **options: Any) -> NewSequence:
    end_token_ids = options.pop("end_token_ids", ())
    sample_index = options.pop("sample_index", 0)
    row_id = options.pop("row_id", f"row-{slot}")
    params = SamplingParams(**options)
    return NewSequence(
        slot=slot,
        token_ids=ints(*PROMPT, *(output or [])),
        num_prompt_tokens=len(PROMPT),
        params=params,
        noise_key=noise_key(params.seed, 0, row_id),
        sample_index=sample_index,
        end_token_ids=end_token_ids,
    )


def make_logits(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, VOCAB_SIZE)).astype(np.float32)


def draw(state: SamplingState, logits: np.ndarray, *slots: int, position: int = 0) -> list[int]:
    """One draw per slot, slot i from row i (or all from the only row)."""
    rows = np.zeros(len(slots), np.int32) if len(logits) == 1 else np.arange(len(slots))
    positions = np.full(len(slots), position, np.int32)
    tokens, _ = state.sample(logits, rows.astype(np.int32), ints(*slots), positions)
    return tokens.tolist()


def test_greedy_and_sampled_slots_in_one_step() -> None:
    state, logits = make_state(), make_logits(3)
    state.add(sequence(0, temperature=0))
    state.add(sequence(1, temperature=1.3))
    state.add(sequence(2, temperature=0.8, top_p=0.7, top_k=9, min_p=0.01))
    expected = [
        int(logits[0].argmax()),
        naive.draw_token(logits[1], temperature=1.3, noise_key=noise_key(None, 0, "row-1")),
        naive.draw_token(
            logits[2],
            temperature=0.8,
            top_p=0.7,
            top_k=9,
            min_p=0.01,
            noise_key=noise_key(None, 0, "row-2"),
        ),
    ]
    assert draw(state, logits, 0, 1, 2) == expected
    assert draw(state, logits[2:], 2) == expected[2:]  # alone, from another row index


def test_a_slot_is_overwritten_by_its_next_sequence() -> None:
    state, logits = make_state(), make_logits(1)
    likeliest = int(logits.argmax())
    state.add(
        sequence(
            0,
            temperature=0,
            logit_bias={7: 100.0},
            presence_penalty=2.0,
            min_tokens=5,
            end_token_ids=(likeliest,),
            logprobs=3,
        )
    )
    assert draw(state, logits, 0) == [7]
    state.add(sequence(0, temperature=0))
    tokens, logprobs = state.sample(logits, ints(0), ints(0), ints(0))
    assert tokens.tolist() == [likeliest] and logprobs is None


def test_same_seed_same_tokens_other_sample_other_tokens() -> None:
    state = make_state()
    for slot, (seed, sample_index) in enumerate([(5, 0), (5, 0), (5, 1), (6, 0), (None, 0)]):
        state.add(sequence(slot, seed=seed, sample_index=sample_index, temperature=2.0))
    drawn = np.array([draw(state, make_logits(1, t), 0, 1, 2, 3, 4, position=t) for t in range(40)])
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
    for other in (2, 3, 4):
        assert (drawn[:, 0] == drawn[:, other]).mean() < 0.3


def test_forks_draw_different_tokens_from_one_row_of_logits() -> None:
    state, logits = make_state(8), make_logits(1)
    for slot in range(8):
        state.add(sequence(slot, sample_index=slot, row_id="one row", temperature=1.5))
    assert len(set(draw(state, logits, *range(8)))) > 3


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened() -> None:
    """It comes back in another slot with its output in token_ids; penalties need all of it."""
    options: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.3,
        "temperature": 0.8,
        "top_p": 0.9,
        "row_id": "r",
    }
    state, output = make_state(), []
    state.add(sequence(0, **options))
    for t in range(20):
        if t == 9:
            state.add(sequence(0, row_id="someone else"))
            state.add(sequence(5, output, **options))
        slot = 0 if t < 9 else 5
        output += draw(state, make_logits(1, t), slot, position=t)
        state.append(ints(slot), ints(output[-1]))
    undisturbed = make_state()
    undisturbed.add(sequence(3, **options))
    expected = []
    for t in range(20):
        expected += draw(undisturbed, make_logits(1, t), 3, position=t)
        undisturbed.append(ints(3), ints(expected[-1]))
    assert output == expected


def test_penalties_see_what_was_appended() -> None:
    """Greedy with a presence penalty that no logit survives never repeats itself."""
    state, logits = make_state(), make_logits(1)
    state.add(sequence(0, temperature=0, presence_penalty=2.0, frequency_penalty=2.0))
    state.add(sequence(1, temperature=0))
    logits /= 4
    seen = []
    for t in range(30):
        tokens = draw(state, logits, 0, 1, position=t)
        state.append(ints(0, 1), ints(*tokens))
        seen.append(tokens[0])
    assert len(set(seen)) == 30 and seen[0] == tokens[1] == int(logits.argmax())


def test_sampling_changes_no_state() -> None:
    state, logits = make_state(), make_logits(1)
    state.add(sequence(0, presence_penalty=1.0))
    assert draw(state, logits, 0) == draw(state, logits, 0)


def test_min_tokens_holds_end_tokens_back_and_no_longer() -> None:
    state, logits = make_state(), make_logits(1)
    logits[0, [11, 12]] = 50.0
    ends = (11, 12, VOCAB_SIZE + 5)  # an end token beyond the logits cannot be drawn anyway
    state.add(sequence(0, temperature=0, min_tokens=2, end_token_ids=ends))
    state.add(sequence(1, min_tokens=2, end_token_ids=ends))
    for t in range(4):
        tokens = draw(state, logits, 0, 1, position=t)
        assert [token in ends for token in tokens] == [t >= 2] * 2


def test_many_end_tokens_and_many_biases_fit() -> None:
    state, logits = make_state(), make_logits(1)
    state.add(sequence(0, temperature=0, logit_bias={1: 90.0}))
    state.add(sequence(1, temperature=0, logit_bias={v: float(v) - 95 for v in range(VOCAB_SIZE)}))
    state.add(sequence(2, temperature=0, min_tokens=1, end_token_ids=tuple(range(85))))
    tokens = draw(state, logits, 0, 1, 2)
    assert tokens[0] == 1
    assert tokens[1] == int((logits[0] + np.arange(VOCAB_SIZE, dtype=np.float32)).argmax())
    assert tokens[2] == 85 + int(logits[0, 85:].argmax())


def test_lists_are_those_of_slots_that_have_any() -> None:
    """For a sampler that keeps them elsewhere; of end tokens only where they may be held back."""
    state = make_state()
    state.add(sequence(0, temperature=0, end_token_ids=(1, 2)))
    state.add(sequence(3, logit_bias={7: 1.5, 4: -2.0}, min_tokens=2, end_token_ids=(1, 2)))
    state.add(sequence(5, output=[9, 2], presence_penalty=1.0))
    lists = state.lists(np.array([5, 0, 3]))
    found = {
        name: {slot: one.tolist() for slot, one in some.items()} for name, some in lists.items()
    }
    assert found == {
        "bias_ids": {3: [7, 4]},
        "bias_values": {3: [1.5, -2.0]},
        "suppressed_ids": {3: [1, 2]},
        "history": {5: [*PROMPT, 9, 2]},
    }
    state.add(sequence(5, temperature=0))
    assert not any(state.lists(np.array([5])).values())


def test_logprobs_are_those_of_the_raw_logits_for_the_slots_that_asked() -> None:
    state, logits = make_state(), make_logits(3)
    state.add(sequence(0, temperature=0, logprobs=0, logit_bias={7: 100.0}))
    state.add(sequence(1))
    state.add(sequence(2, temperature=0.5, top_k=1, logprobs=2))
    tokens, lines = state.sample(logits, ints(0, 1, 2), ints(0, 1, 2), ints(0, 0, 0))
    assert lines is not None and lines.top_ids.shape == (3, 2)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert tokens[0] == 7
    assert lines.logprobs[0] == pytest.approx(log_softmax[0, 7], abs=1e-5)
    assert lines.ranks.tolist() == [1 + int((logits[0] > logits[0, 7]).sum()), 0, 1]
    assert np.isnan(lines.logprobs[1]) and (lines.top_ids[:2] == -1).all()
    assert lines.top_ids[2].tolist() == np.argsort(-logits[2])[:2].tolist()


def test_a_broken_row_fails_alone() -> None:
    state, logits = make_state(), make_logits(3)
    for slot, options in enumerate([{"temperature": 0}, {}, {"logprobs": 1}]):
        state.add(sequence(slot, presence_penalty=0.1, **options))
    before = draw(state, logits, 0, 1, 2)
    logits[1, 5] = np.nan
    tokens, lines = state.sample(logits, ints(0, 1, 2), ints(0, 1, 2), ints(0, 0, 0))
    assert tokens.tolist() == [before[0], -1, before[2]]
    assert lines is not None and np.isfinite(lines.logprobs[2])
    state.append(ints(0, 1, 2), tokens)  # -1 in a history is harmless
    assert draw(state, make_logits(3), 0, 1, 2, position=1)[1] >= 0


def test_a_set_of_allowed_tokens() -> None:
    state, logits = make_state(), make_logits(1)
    state.add(sequence(0, temperature=0))
    state.add(sequence(1))
    allowed = np.zeros((2, 3), np.uint32)
    allowed[:, 2] = 1 << 9  # token 73
    tokens, _ = state.sample(logits, ints(0, 0), ints(0, 1), ints(0, 0), allowed)
    assert tokens.tolist() == [73, 73]


def test_nothing_to_draw() -> None:
    state, none = make_state(), np.empty(0, np.int32)
    tokens, lines = state.sample(make_logits(1), none, none, none)
    assert len(tokens) == 0 and lines is None
    state.append(none, none)


def test_bad_input_is_named() -> None:
    state = make_state()
    with pytest.raises(RequestError, match=r"token id 90; the model's ids are 0 to 89"):
        state.add(sequence(0, logit_bias={3: 1.0, 90: 1.0}))
    with pytest.raises(ShapeError, match="float64"):
        draw(state, make_logits(1).astype(np.float64), 0)
    with pytest.raises(ShapeError, match="vocab_size is 90"):
        draw(state, np.zeros((1, 91), np.float32), 0)
    with pytest.raises(ShapeError, match="C-contiguous"):
        draw(state, np.zeros((2, 2 * VOCAB_SIZE), np.float32)[:, ::2], 0, 1)
    with pytest.raises(ShapeError, match=str(MAX_VOCAB_SIZE)):
        SamplingState(1, 1, MAX_VOCAB_SIZE + 1)
    state.add(sequence(0, [0] * (64 - len(PROMPT)), presence_penalty=1.0))
    state.append(ints(0), ints(1))  # the last token is drawn from position max_model_len - 1
    with pytest.raises(ShapeError, match="max_model_len = 64"):
        state.append(ints(0), ints(1))


def test_greedy_steps_compile_nothing_else() -> None:
    """Only the argmax kernel is needed: a greedy job does not wait for the sampler."""
    code = """
import numpy as np
from batchwright.kernels.sample import numba as kernel
from tests.sampling.test_state import draw, make_logits, make_state, sequence
state = make_state()
state.add(sequence(0, temperature=0))
draw(state, make_logits(1), 0)
assert len(kernel._argmax_rows.signatures) == 1
assert kernel._worker.cache_info().currsize == 0
state.add(sequence(0))
draw(state, make_logits(1), 0)
assert kernel._worker.cache_info().currsize == 1
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
