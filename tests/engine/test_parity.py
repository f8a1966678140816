"""The whole engine against transformers, and against itself bit for bit, for every architecture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from batchwright.attention.backend import block_bytes
from batchwright.models.loader import load_model
from batchwright.techniques import names
from batchwright.weights.checkpoint import open_checkpoint
from tests.engine.harness import Run, mixed_job, request, run
from tests.models.reference import TINY, make_checkpoint
from tests.sched.harness import start_what_fits_now

pytestmark = pytest.mark.cpu

TIE = 1e-3
"""Greedy tokens must be equal where the reference's two best logits are further apart than this."""

SETTINGS = {
    "chunks of 7": {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    "one step holds all": {"max_num_batched_tokens": 4096},
    "no sharing": {"prefix_sharing": False},
    "look-ahead": {"look_ahead": 1, "max_num_batched_tokens": 50, "max_num_seqs": 5},
    "two threads": {"num_threads": 2},
}


def check_against_reference(name: str, outcome: Run, model, tie: float = TIE) -> int:
    """Every drawn token is the reference's greedy choice; returns the number of near-ties."""
    margins, ties = [], 0
    for result in outcome.results.values():
        assert result.error is None
        for output in result.outputs:
            ids = result.prompt_token_ids + output.token_ids
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0].float()
            rows = logits[len(result.prompt_token_ids) - 1 : -1]
            best = rows.topk(2).values
            margin = (best[:, 0] - best[:, 1]).numpy()
            wrong = rows.argmax(-1).numpy() != np.array(output.token_ids)
            assert not (wrong & (margin > tie)).any(), f"{name} {result.request_id}"
            margins.append(margin.min())
            ties += int((margin <= tie).sum())
    print(f"{name}: smallest margin {min(margins):.4f}, {ties} near-ties")
    return ties


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    model = make_checkpoint(name, tmp_path)
    job = mixed_job()
    outcome = run(tmp_path, job, max_num_batched_tokens=64, max_num_seqs=6)
    assert len(outcome.results) == len(job)
    num_ties = check_against_reference(name, outcome, model)
    assert num_ties <= 2, "too many near-ties for the comparison to mean much"
    tokens = outcome.tokens()
    assert tokens["r3"][0][:9] == tokens["r6"][0][:9], "duplicates answer alike"
    assert len(tokens["fork"]) == 3
    for settings in SETTINGS.values():
        again = run(tmp_path, job, **settings)
        assert again.tokens() == tokens
        assert again.logits == outcome.logits, f"{settings}: logits differ in bits"
    again = run(tmp_path, job[::-1], max_num_batched_tokens=33, max_num_seqs=4)
    assert again.logits == outcome.logits, "order: logits differ in bits"
    few = [job[1], job[2], job[-1]]
    again = run(tmp_path, few, max_num_batched_tokens=1, max_num_seqs=1)
    assert again.logits.items() <= outcome.logits.items(), "token by token: logits differ in bits"


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [("llama", 9), ("mistral", 5), ("gemma2", 9), ("gemma3_text", 9), ("qwen3_moe", 9)],
)
def test_forced_preemption_changes_no_bit(name, num_blocks, tmp_path):
    make_checkpoint(name, tmp_path)
    job = mixed_job(max_tokens=40)
    outcome = run(tmp_path, job)
    tight = run(
        tmp_path,
        job,
        prepare=lambda engine: start_what_fits_now(engine._scheduler),
        kv_cache_bytes=num_blocks * bytes_of_a_block(tmp_path),
        max_num_batched_tokens=48,
        max_num_seqs=6,
    )
    assert tight.engine.stats.num_preemptions > 0
    assert tight.engine.stats.num_recomputed_tokens > 0
    assert tight.logits == outcome.logits
    assert tight.tokens() == outcome.tokens()


@pytest.mark.parametrize("order", ["auto", *names("plan.orders")])
def test_no_order_changes_a_bit(order, tmp_path):
    make_checkpoint("llama", tmp_path)
    job = mixed_job(max_tokens=20)
    expected = run(tmp_path, job)
    for kv_tokens in (None, 320):
        outcome = run(tmp_path, job, order=order, kv_tokens=kv_tokens, max_num_seqs=5)
        assert outcome.logits == expected.logits
        assert outcome.tokens() == expected.tokens()


def bytes_of_a_block(path) -> int:
    """KV bytes of one block in all layers."""
    model = load_model(open_checkpoint(path), dtype=torch.float32, max_positions=256)
    return sum(block_bytes(spec, 32, 4) for spec in model.attention_specs)


def test_a_shared_prefix_is_computed_once(tmp_path):
    make_checkpoint("llama", tmp_path)
    rng = np.random.default_rng(1)
    prefix = rng.integers(3, 97, 96).tolist()
    job = [request(f"r{i}", prefix + rng.integers(3, 97, 5).tolist(), 4) for i in range(20)]
    outcome = run(tmp_path, job, max_num_batched_tokens=40, max_num_seqs=20)
    stats = outcome.engine.stats
    assert stats.num_cached_tokens == 19 * 96
    assert stats.num_computed_tokens == 96 + 20 * 5 + 20 * 3


@pytest.mark.parametrize("change", ["rotary", "window"])
def test_the_comparison_can_fail(change, tmp_path):
    """Negative controls: a wrong rotary base, a mask off by one."""
    model = make_checkpoint("mistral", tmp_path)
    config_path = tmp_path / "config.json"
    config = json.loads(config_path.read_text())
    if change == "window":
        config["sliding_window"] += 1
    else:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 9000.0}
    config_path.write_text(json.dumps(config))
    outcome = run(tmp_path, mixed_job())
    with pytest.raises(AssertionError, match="mistral r"):
        check_against_reference("mistral", outcome, model)
