"""The device executor on two ranks, without a GPU: two processes against one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchwright import llm
from batchwright.request import SamplingParams
from tests.engine.harness import mixed_job, run
from tests.models.reference import make_checkpoint
from tests.tensor_parallel import device_pair
from tests.tensor_parallel.conftest import lasting

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def device_ranks():
    yield from lasting(2, device_pair.PROGRAM)


@pytest.mark.parametrize("name", ["llama_biased", "mixtral", "gemma2"])
def test_graphs_and_look_ahead(name, tmp_path, device_ranks, monkeypatch):
    make_checkpoint(name, tmp_path, intermediate_size=38)
    sampled = [
        replace(row, id=f"s{i}", params=SamplingParams(temperature=0.9, seed=i, max_tokens=6))
        for i, row in enumerate(mixed_job())
    ]
    job = [*mixed_job(), *sampled]
    settings = {"max_num_batched_tokens": 48, "max_num_seqs": 6, "look_ahead": 1}
    alone = run(tmp_path, job, **settings)
    monkeypatch.setattr(llm, "Followers", lambda size, *, on_gpu: device_ranks)
    monkeypatch.setattr(llm, "build_executor", device_pair.build_executor)
    together = run(tmp_path, job, **settings, tensor_parallel_size=2)
    assert together.tokens() == alone.tokens()
    assert device_pair.MADE[-1].num_replayed > 5
