"""Rows over a tree of long prompts: attention shares its nodes and changes no bit of the logits."""

from __future__ import annotations

import numpy as np
import pytest

from batchwright.attention.backends import numba as backend
from batchwright.kernels.paged_attention.plan import AttentionPlan, loaded_keys, plan_attention
from batchwright.techniques import names
from tests.engine.harness import request, run
from tests.models.reference import TINY, make_checkpoint

pytestmark = pytest.mark.cpu


def tree_job() -> list:
    """Twelve rows: 140 tokens common to all, 140 more to four each, and 1-20 of their own."""
    rng = np.random.default_rng(0)
    root, rows = rng.integers(3, 90, 140), []
    for branch in range(3):
        common = [*root, *rng.integers(3, 90, 140)]
        for leaf in range(4):
            prompt = [*common, *rng.integers(3, 90, 1 + 6 * leaf)]
            rows.append(request(f"{branch}.{leaf}", prompt, max_tokens=6))
    return rows


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_sharing_nodes_changes_no_bit(name, tmp_path, monkeypatch):
    config, settings = TINY[name]
    monkeypatch.setitem(TINY, name, (config, {**settings, "max_position_embeddings": 512}))
    make_checkpoint(name, tmp_path)
    most_segments, saved = [], []

    def watched(*arguments, **options) -> AttentionPlan:
        plan = plan_attention(*arguments, **options)
        per_entry = np.zeros(len(plan.tokens), int)
        for first, end, _, _ in plan.segments.tolist():
            per_entry[first:end] += 1
        most_segments.append(per_entry.max(initial=0))
        alone = plan_attention(*arguments, **(options | {"block_table": None}))
        saved.append(loaded_keys(alone) - loaded_keys(plan))
        return plan

    monkeypatch.setattr(backend, "plan_attention", watched)
    shared = run(tmp_path, tree_job())
    assert max(most_segments) == 3, "no row went through root, branch and suffix"
    # 280 tokens hold a tile of the root and one of a branch; the root may be in two items
    assert max(saved) >= 10 * 128 + 9 * 128
    most_segments.clear()
    saved.clear()
    alone = run(tmp_path, tree_job(), prefix_sharing=False)
    assert max(most_segments) == 1 and max(saved) == 0
    assert shared.tokens() == alone.tokens()
    assert shared.logits == alone.logits


@pytest.fixture(scope="module")
def as_they_come(tmp_path_factory):
    """A checkpoint, and the rows' logits in it without any sharing."""
    path = tmp_path_factory.mktemp("llama")
    config, settings = TINY["llama"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, "llama", (config, {**settings, "max_position_embeddings": 512}))
        make_checkpoint("llama", path)
    return path, run(path, tree_job(), prefix_sharing=False, order="fcfs")


@pytest.mark.parametrize("kv_tokens", [None, 640])
@pytest.mark.parametrize("order", ["auto", *names("plan.orders")])
def test_no_order_and_no_way_of_sharing_changes_a_bit(order, kv_tokens, as_they_come, monkeypatch):
    """Prefixes shared or not, their attention shared or not, memory for all rows or for two."""
    path, expected = as_they_come
    settings = {"order": order, "kv_tokens": kv_tokens}
    outcomes = [run(path, tree_job(), **settings)]
    outcomes.append(run(path, tree_job(), prefix_sharing=False, **settings))

    def alone(*arguments, **options) -> AttentionPlan:
        return plan_attention(*arguments, **(options | {"block_table": None}))

    monkeypatch.setattr(backend, "plan_attention", alone)
    outcomes.append(run(path, tree_job(), **settings))
    for outcome in outcomes:
        assert outcome.tokens() == expected.tokens()
        assert outcome.logits == expected.logits
