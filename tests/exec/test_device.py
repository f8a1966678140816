"""The device executor without a GPU: the CPU device, twins for kernels, reruns for graphs.

Whole jobs through the engine, against the CPU executor: the same greedy tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from batchwright import llm
from batchwright.config import EngineConfig
from batchwright.engine import Engine
from batchwright.exec.device.executor import DeviceExecutor
from batchwright.exec.device.graphs import Rerun
from batchwright.kv.groups import windows_of_layers
from batchwright.weights.checkpoint import open_checkpoint
from tests.engine.harness import NoTokenizer, mixed_job, run
from tests.engine.test_parity import bytes_of_a_block
from tests.models.reference import make_checkpoint
from tests.sched.harness import start_what_fits_now

pytestmark = pytest.mark.cpu


def device_engine(
    path,
    monkeypatch,
    *,
    graphs=True,
    num_programs=(8, 4),
    made: Callable[[DeviceExecutor], None] = lambda executor: None,
    **settings,
) -> Engine:
    """An engine like build_engine's, with a DeviceExecutor on the CPU."""
    settings = {"num_threads": 1, "look_ahead": 1, **settings}

    def build(model, config, vocab_size):
        windows, group_of_layer = windows_of_layers([s.window for s in model.attention_specs])
        sizes = llm._block_bytes(model, group_of_layer, config, torch.float32)
        groups = config.kv_groups(windows, sizes)
        executor = DeviceExecutor(
            model,
            groups,
            group_of_layer,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            vocab_size=vocab_size,
            graphs=Rerun() if graphs else None,
            max_graph_tokens=40,
            num_programs=num_programs,
        )
        for kv in executor._kv:
            kv.fill_(torch.nan)  # what nobody has written must not be read
        made(executor)
        return executor, groups

    monkeypatch.setattr(llm, "_local_executor", build)
    engine, _ = llm.build_engine(open_checkpoint(path), NoTokenizer(), EngineConfig(**settings))
    monkeypatch.undo()
    return engine


def tokens_of(engine: Engine, job) -> dict[str, list[list[int]]]:
    results = {result.request_id: result for result in engine.run(job)}
    engine.check_integrity()
    assert all(result.error is None for result in results.values())
    return {id: [o.token_ids for o in r.outputs] for id, r in results.items()}


SETTINGS = {
    "graphs and look-ahead": {"max_num_batched_tokens": 48, "max_num_seqs": 6},
    "no graphs": {"graphs": False, "max_num_batched_tokens": 48, "max_num_seqs": 6},
    "no look-ahead": {"look_ahead": 0, "max_num_batched_tokens": 48, "max_num_seqs": 6},
    "one step holds all": {"max_num_batched_tokens": 4096, "max_num_seqs": 16},
    "chunks of 7": {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    "nothing is cut": {"num_programs": (0, 0), "max_num_batched_tokens": 48, "max_num_seqs": 6},
    "much is cut": {"num_programs": (64, 64), "max_num_batched_tokens": 48, "max_num_seqs": 6},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_greedy_tokens_are_those_of_the_cpu(settings, tmp_path, monkeypatch):
    make_checkpoint("llama", tmp_path)
    expected = run(tmp_path, mixed_job()).tokens()
    executors = []
    engine = device_engine(tmp_path, monkeypatch, made=executors.append, **settings)
    assert tokens_of(engine, mixed_job()) == expected
    assert (executors[0].num_replayed > 0) == settings.get("graphs", True)


@pytest.mark.parametrize(
    "name",
    ["llama_biased", "mistral", "gemma2", "gemma3_text", "qwen3", "qwen3_moe", "gpt2", "opt"],
)
def test_every_kind_of_layer(name, tmp_path, monkeypatch):
    make_checkpoint(name, tmp_path)
    expected = run(tmp_path, mixed_job()).tokens()
    engine = device_engine(
        tmp_path, monkeypatch, graphs="moe" not in name, max_num_batched_tokens=48, max_num_seqs=6
    )
    assert tokens_of(engine, mixed_job()) == expected


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_forced_preemption(look_ahead, tmp_path, monkeypatch):
    make_checkpoint("llama", tmp_path)
    job = mixed_job(max_tokens=40)
    expected = run(tmp_path, job).tokens()
    engine = device_engine(
        tmp_path,
        monkeypatch,
        look_ahead=look_ahead,
        kv_cache_bytes=9 * bytes_of_a_block(tmp_path),
        max_num_batched_tokens=48,
        max_num_seqs=6,
    )
    start_what_fits_now(engine._scheduler)
    assert tokens_of(engine, job) == expected
    assert engine.stats.num_preemptions > 0
