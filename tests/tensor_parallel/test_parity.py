"""Two processes against one: the same greedy tokens, logits up to rounding, bits in any batch."""

from __future__ import annotations

import numpy as np
import pytest

from batchwright import llm
from batchwright.errors import ConfigError
from batchwright.request import Request, SamplingParams, Task
from batchwright.sampling.state import SamplingState
from tests.engine.harness import mixed_job, run
from tests.models.reference import TOLERANCE, make_checkpoint
from tests.sched.harness import start_what_fits_now
from tests.tensor_parallel.conftest import lasting

pytestmark = pytest.mark.cpu

EVEN = {"intermediate_size": 38}
CHECKPOINTS = {  # odd vocabularies: ranks have parts of different width
    "llama": EVEN,
    "llama_biased": EVEN,  # biases everywhere, tied embeddings
    "qwen2": EVEN,  # biases of q, k and v
    "qwen3": EVEN,
    "gemma2": EVEN,
    "mixtral": EVEN,
    "qwen3_moe": EVEN,
    "gpt2": {},
    "gpt_bigcode_multi_head": {"n_head": 2},  # one key-value head a rank
    "opt_post_norm": {"ffn_dim": 62},
}


@pytest.fixture
def drawn_from(monkeypatch):
    """Logits that the sampler sees, by sequence and output position."""
    seen: dict[tuple[int, int, int], np.ndarray] = {}
    sample = SamplingState.sample

    def record(self, rows, row_of_sample, slots, output_positions, *rest):
        for row, slot, position in zip(row_of_sample, slots, output_positions):
            key = int(self._slots[slot]["noise_key"]), int(self._slots[slot]["sample_index"])
            seen[(*key, int(position))] = rows[row].copy()
        return sample(self, rows, row_of_sample, slots, output_positions, *rest)

    monkeypatch.setattr(SamplingState, "sample", record)
    return seen


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_two_processes_answer_as_one(name, tmp_path, pair, drawn_from):
    make_checkpoint(name, tmp_path, **CHECKPOINTS[name])
    job = mixed_job()
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 6}
    alone = run(tmp_path, job, **settings)
    alone_logits = dict(drawn_from)
    drawn_from.clear()
    together = run(tmp_path, job, **settings, tensor_parallel_size=2)
    assert together.tokens() == alone.tokens()
    assert drawn_from.keys() == alone_logits.keys()
    scale = max(np.abs(row).max() for row in alone_logits.values())
    error = max(np.abs(row - drawn_from[key]).max() for key, row in alone_logits.items())
    assert error < TOLERANCE * scale
    assert error > 0, "sums are made in another order, so some bit differs"


@pytest.mark.parametrize("name", ["llama_biased", "mixtral"])
def test_bits_do_not_depend_on_the_batch(name, tmp_path, pair):
    make_checkpoint(name, tmp_path, **EVEN)
    job = mixed_job()
    outcome = run(tmp_path, job, max_num_seqs=6, tensor_parallel_size=2)
    for settings in (
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"prefix_sharing": False},
        {"look_ahead": 1, "max_num_batched_tokens": 50, "max_num_seqs": 5},
    ):
        again = run(tmp_path, job[::-1], **settings, tensor_parallel_size=2)
        assert again.tokens() == outcome.tokens()
        assert again.logits == outcome.logits, settings


@pytest.fixture
def three():
    yield from lasting(3)


def test_three_ranks(tmp_path, three, monkeypatch):
    """More summands than two: their order must be the same for every row."""
    make_checkpoint("llama_biased", tmp_path, num_key_value_heads=3, intermediate_size=39)
    job = mixed_job()
    alone = run(tmp_path, job, max_num_seqs=6)
    monkeypatch.setattr(llm, "Followers", lambda size, *, on_gpu: three)
    outcome = run(tmp_path, job, max_num_seqs=6, tensor_parallel_size=3)
    settings = {"max_num_batched_tokens": 7, "max_num_seqs": 3, "tensor_parallel_size": 3}
    again = run(tmp_path, job[::-1], **settings)
    assert outcome.tokens() == again.tokens() == alone.tokens()
    assert again.logits == outcome.logits


def test_all_kinds_of_rows(tmp_path, pair):
    """Draws with a seed, filters and penalties, scores, embeddings and preemption."""
    make_checkpoint("llama", tmp_path, **EVEN)
    prompts = [np.array(row.prompt_token_ids, np.int32) for row in mixed_job()]
    rows = [
        Request(id=f"draw{i}", prompt_token_ids=prompt, params=params)
        for i, prompt in enumerate(prompts)
        for params in [
            SamplingParams(
                temperature=1.2, top_p=0.9, seed=i, max_tokens=12, n=2, repetition_penalty=1.3
            )
        ]
    ]
    rows += [
        Request(id=f"score{i}", prompt_token_ids=prompt, task=Task.SCORE, score_start=1)
        for i, prompt in enumerate(prompts)
        if len(prompt) > 1
    ]
    rows += [
        Request(id=f"embed{i}", prompt_token_ids=prompt, task=Task.EMBED, pooling="mean")
        for i, prompt in enumerate(prompts)
    ]
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "kv_tokens": 9 * 32}
    settings["prepare"] = lambda engine: start_what_fits_now(engine._scheduler)
    alone = run(tmp_path, rows, **settings)
    together = run(tmp_path, rows, **settings, tensor_parallel_size=2)
    assert together.engine.stats.num_preemptions > 0
    assert together.tokens() == alone.tokens()
    for id, expected in alone.results.items():
        found = together.results[id]
        assert found.error is None
        if expected.score is not None:
            assert found.score.logprob == pytest.approx(expected.score.logprob, rel=1e-3)
        if expected.embedding is not None:
            np.testing.assert_allclose(found.embedding, expected.embedding, atol=1e-4)


def test_int8_and_bf16(tmp_path, pair):
    """Lossy: scales are of a rank's own inputs. It runs, and the same in any batch."""
    make_checkpoint("llama_biased", tmp_path, **EVEN)
    for settings in ({"quantize": "int8"}, {"dtype": "bfloat16"}):
        outcome = run(tmp_path, mixed_job(), **settings, tensor_parallel_size=2)
        assert all(result.error is None for result in outcome.results.values())
        if "quantize" in settings:
            again = run(tmp_path, mixed_job(), **settings, max_num_seqs=3, tensor_parallel_size=2)
            assert again.logits == outcome.logits


@pytest.mark.parametrize(
    ("name", "changes", "size", "words"),
    [
        ("llama", EVEN, 3, r"is 3, which must .* heads \(2\) .* MLPs \(38\); use 1 or 2 "),
        ("llama", {}, 2, r"width of its MLPs \(37\); use 1 "),
        ("gpt_bigcode", {}, 2, r"heads \(1\) "),
        ("qwen3_moe", {**EVEN, "num_key_value_heads": 6}, 4, r"\(24, 38\); use 1 or 2 "),
    ],
)
def test_what_cannot_be_divided_is_refused(name, changes, size, words, tmp_path):
    make_checkpoint(name, tmp_path, **changes)
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, [], tensor_parallel_size=size)
