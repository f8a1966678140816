"""The device executor without a GPU: the CPU device, twins for kernels, reruns for graphs.

Whole jobs through the engine, against the CPU executor: the same tokens. On a card, and in Triton's
interpreter (TRITON_INTERPRET=1, see test_device_interpreter.py), the kernels compute.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch

from batchwright import llm
from batchwright.config import EngineConfig
from batchwright.engine import Engine
from batchwright.errors import ConfigError
from batchwright.exec.device.build import bytes_of_blocks
from batchwright.exec.device.executor import DeviceExecutor
from batchwright.exec.device.graphs import Rerun
from batchwright.exec.device.layout import Layout
from batchwright.exec.device.sampler import DeviceSampler, HostSampler
from batchwright.exec.device.shapes import graph_tokens
from batchwright.kv.groups import KVGroup, windows_of_layers
from batchwright.models.loader import load_model
from batchwright.request import Request, SamplingParams, Task
from batchwright.step import NewSequence, Step
from batchwright.weights.checkpoint import open_checkpoint
from tests.engine.harness import NoTokenizer, mixed_job, run
from tests.engine.test_parity import bytes_of_a_block
from tests.exec.waiting import nothing_waits
from tests.models.reference import make_checkpoint
from tests.sched.harness import start_what_fits_now

pytestmark = pytest.mark.cpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def device_engine(
    path,
    monkeypatch,
    *,
    graphs=True,
    num_programs=(8, 4),
    made: Callable[[DeviceExecutor], None] = lambda executor: None,
    regroup: Callable[[list[KVGroup]], list[KVGroup]] = lambda groups: groups,
    kv_cache_dtype: str = "auto",
    **settings,
) -> Engine:
    """An engine like build_engine's, with a DeviceExecutor on the CPU.

    `regroup` changes the KV groups: a host has room on a CPU too.
    """
    settings = {"device": "cpu", "num_threads": 1, "look_ahead": 1, **settings}

    def build(model, config, *, vocab_size, ranks):
        windows, group_of_layer = windows_of_layers([s.window for s in model.attention_specs])
        sizes = bytes_of_blocks(model.attention_specs, group_of_layer, config, lambda head_dim: 4)
        groups = regroup(config.kv_groups(windows, sizes))
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
            kv_cache_dtype=kv_cache_dtype,
        )
        for part in (part for group in executor._kv.parts for part in group):
            # what nobody has written must not be read
            part.fill_(torch.nan if part.is_floating_point() else 127)
        made(executor)
        return executor, groups, config

    monkeypatch.setattr(llm, "build_executor", build)
    engine, _ = llm.build_engine(open_checkpoint(path), NoTokenizer(), EngineConfig(**settings))
    monkeypatch.undo()
    return engine


def test_graphs_recorded_before_the_first_step(tmp_path, monkeypatch):
    """Recording writes nothing, and steps that decode find their graphs."""
    make_checkpoint("llama", tmp_path)
    expected = run(tmp_path, mixed_job()).tokens()
    executors = []
    engine = device_engine(
        tmp_path, monkeypatch, made=executors.append, max_num_batched_tokens=48, max_num_seqs=6
    )
    (executor,) = executors
    before = [kv.clone() for (kv,) in executor._kv.parts]
    executor.run_largest(48, 6, 256)
    executor.capture_decoding()
    for (kv,), was in zip(executor._kv.parts, before):
        assert torch.equal(kv.nan_to_num(7.0), was.nan_to_num(7.0))
    assert {key.num_tokens for key in executor._captured} == {1, 2, 4, 8}  # six slots
    assert all(replay is not None for replay in executor._captured.values())
    assert tokens_of(engine, mixed_job()) == expected


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


@pytest.mark.parametrize(
    ("name", "kv_cache_dtype"), [("llama", "int8"), ("gemma2", "fp8"), ("qwen3_moe", "int8")]
)
def test_keys_and_values_in_eight_bits(name, kv_cache_dtype, tmp_path, monkeypatch):
    """int8 has the CPU's numbers and scales, so its tokens; fp8 is compared with itself, preempted,
    in other steps and with room on a host."""
    if KERNELS and DEVICE == "cpu" and kv_cache_dtype == "fp8":
        pytest.skip("the interpreter has no such numbers")
    make_checkpoint(name, tmp_path)
    sizes = {"max_num_batched_tokens": 48, "max_num_seqs": 6, "graphs": "moe" not in name}
    engine = device_engine(tmp_path, monkeypatch, kv_cache_dtype=kv_cache_dtype, **sizes)
    found = tokens_of(engine, mixed_job())
    if kv_cache_dtype == "int8":
        assert found == run(tmp_path, mixed_job(), kv_cache_dtype="int8").tokens()
    else:
        plain = run(tmp_path, mixed_job()).tokens()
        first = [(rows[0][0], plain[id][0][0]) for id, rows in found.items() if rows[0]]
        assert sum(a == b for a, b in first) > len(first) / 2
    crowded = device_engine(
        tmp_path,
        monkeypatch,
        kv_cache_dtype=kv_cache_dtype,
        regroup=lambda groups: [
            dataclasses.replace(group, num_host_blocks=50 * (len(groups) == 1)) for group in groups
        ],
        kv_cache_bytes=9 * bytes_of_a_block(tmp_path),
        **sizes,
    )
    start_what_fits_now(crowded._scheduler)
    assert tokens_of(crowded, mixed_job()) == found
    assert crowded.stats.num_preemptions > 0


def varied_job(max_tokens: int = 10) -> list[Request]:
    """Every kind of draw: greedy, temperature, filters, penalties, bias, minima, n > 1."""
    rng = np.random.default_rng(3)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.2, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7, "n": 2},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "n": 2},
        {"temperature": 0.0, "logit_bias": {5: 30.0, 7: -100.0}},
        {"temperature": 0.5, "min_tokens": 4, "stop_token_ids": (5, 6, 7, 8, 9)},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.9, "logprobs": 0, "top_k": 20},
    ]
    return [
        Request(
            id=f"v{index}",
            prompt_token_ids=rng.integers(3, 90, 5 + 9 * index).astype(np.int32),
            params=SamplingParams(max_tokens=max_tokens, seed=index, **kind),
        )
        for index, kind in enumerate(kinds)
    ]


def test_draws_after_preemption(tmp_path, monkeypatch):
    """Rows with penalties, bias and minima come back with what they drew; samples of one prompt."""
    make_checkpoint("llama", tmp_path)
    rng = np.random.default_rng(3)
    kinds = [
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "n": 2},
        {"temperature": 0.0, "logit_bias": {token: float(token % 5) for token in range(40)}},
        {"temperature": 0.5, "min_tokens": 5, "stop_token_ids": tuple(range(3, 40))},
    ]
    job = [
        Request(
            id=f"p{index}",
            prompt_token_ids=rng.integers(3, 90, 29 + index).astype(np.int32),
            params=SamplingParams(max_tokens=6, seed=index, **kind),
        )
        for index, kind in enumerate(kinds)
    ]
    expected = run(tmp_path, job).tokens()
    engine = device_engine(
        tmp_path,
        monkeypatch,
        kv_cache_bytes=6 * bytes_of_a_block(tmp_path),
        max_num_batched_tokens=60,
        max_num_seqs=5,
    )
    start_what_fits_now(engine._scheduler)
    assert tokens_of(engine, job) == expected
    assert engine.stats.num_preemptions > 0


@pytest.mark.skipif(not KERNELS, reason="without kernels the host draws, and so waits")
def test_no_step_waits_for_draws_scores_or_embeddings(tmp_path, monkeypatch):
    make_checkpoint("llama", tmp_path)
    prompt = np.arange(5, 45, dtype=np.int32)
    job = [one for one in varied_job(2) if one.id in ("v6", "v7", "v8", "v9")]
    job += [
        Request(id="s", prompt_token_ids=prompt, task=Task.SCORE),
        Request(id="e", prompt_token_ids=prompt, task=Task.EMBED, pooling="mean"),
        Request(id="l", prompt_token_ids=prompt + 1, task=Task.EMBED, pooling="last"),
    ]
    executors = []
    engine = device_engine(
        tmp_path, monkeypatch, made=executors.append, max_num_batched_tokens=32, max_num_seqs=6
    )
    execute = executors[0].execute

    def guarded(step):
        with nothing_waits():
            return execute(step)

    executors[0].execute = guarded
    results = {result.request_id: result for result in engine.run(job)}
    assert {id for id, result in results.items() if result.error is not None} == set()


def test_draws_are_those_of_the_cpu(tmp_path, monkeypatch):
    make_checkpoint("llama", tmp_path)
    job = varied_job(3 if os.environ.get("TRITON_INTERPRET") else 10)
    expected = run(tmp_path, job)
    engine = device_engine(tmp_path, monkeypatch, max_num_batched_tokens=60, max_num_seqs=8)
    results = {result.request_id: result for result in engine.run(job)}
    assert {id: [o.token_ids for o in r.outputs] for id, r in results.items()} == expected.tokens()
    for id in ("v9", "v10"):
        found, wanted = (r[id].outputs[0].logprobs for r in (results, expected.results))
        for one, other in zip(found, wanted):
            assert one.rank == other.rank and one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.skipif(not KERNELS, reason="no kernels: neither a card nor Triton's interpreter")
def test_draws_keep_to_masks():
    """DeviceSampler against HostSampler, with masks for some of the draws."""
    rng = np.random.default_rng(2)
    masks = rng.integers(0, 2**32, (2, 4), dtype=np.uint32)
    none = np.empty(0, np.int32)
    step = Step(
        step_id=0, finished_slots=none, new_sequences=(), table_updates=(), block_copies=(),
        slots=none, cu_seqlens_q=none, token_ids=none, positions=none, kv_slots=(),
        sample_tokens=none, sample_slots=np.array([3, 0, 2], np.int32), masks=masks,
        mask_of_sample=np.array([1, -1, 0], np.int32), score_tokens=none, score_targets=none,
    )  # fmt: skip
    logits = torch.from_numpy(rng.standard_normal((3, 97)).astype(np.float32)).to(DEVICE)
    positions = np.array([4, 0, 1], np.int32)
    samplers = HostSampler(4, 50, 97), DeviceSampler(4, 50, 97, torch.device(DEVICE))
    drawn = []
    for sampler in samplers:
        for slot, params in enumerate(({"temperature": 0.0}, {}, {"top_k": 9}, {"top_p": 0.8})):
            prompt = np.array([5, 6], np.int32)
            sampler.add(NewSequence(slot, prompt, 2, SamplingParams(**params), 7 + slot, 0, ()))
        arrays = sampler.inputs(step, positions)
        layout = Layout.of(arrays)
        buffer = np.zeros(layout.end, np.uint8)
        layout.write(arrays, buffer)
        views = layout.views(torch.from_numpy(buffer).to(DEVICE))
        sampler.apply(views)
        drawn.append(sampler.draw(logits, step, positions, views).token_ids.tolist())
    assert drawn[0] == drawn[1]
    assert masks[1, drawn[0][0] // 32] >> np.uint32(drawn[0][0] % 32) & 1


def test_scores_and_embeddings_are_those_of_the_cpu(tmp_path, monkeypatch):
    make_checkpoint("llama", tmp_path)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 90, length).astype(np.int32) for length in (3, 40, 70)]
    job = [Request(id=f"s{i}", prompt_token_ids=p, task=Task.SCORE) for i, p in enumerate(prompts)]
    job += [
        Request(id=f"e{i}", prompt_token_ids=p, task=Task.EMBED, pooling=pooling)
        for i, (p, pooling) in enumerate(zip(prompts, ("mean", "last", "mean")))
    ]
    expected = run(tmp_path, job, max_num_batched_tokens=32, max_num_seqs=4).results
    engine = device_engine(tmp_path, monkeypatch, max_num_batched_tokens=32, max_num_seqs=4)
    for result in engine.run(job):
        wanted = expected[result.request_id]
        if result.score is not None:
            assert result.score.logprob == pytest.approx(wanted.score.logprob, abs=1e-3)
        else:
            np.testing.assert_allclose(result.embedding, wanted.embedding, atol=1e-4)


def test_memory_that_runs_out_halves_the_batch(tmp_path, monkeypatch):
    """Once in the middle of a step, once of a capture; nothing is lost, and graphs are given up."""
    make_checkpoint("llama", tmp_path)
    expected = run(tmp_path, mixed_job()).tokens()
    executors = []
    engine = device_engine(
        tmp_path, monkeypatch, made=executors.append, max_num_batched_tokens=48, max_num_seqs=6
    )
    executor, calls = executors[0], iter(range(10**6))
    forward = executor._model.forward

    def failing(*arguments):
        if next(calls) in (3, 9):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments)

    executor._model.forward = failing
    assert tokens_of(engine, mixed_job()) == expected
    assert next(calls) > 10 and not executor._sizes


def test_a_result_that_fails_when_it_is_waited_for_ends_one_row(tmp_path, monkeypatch):
    make_checkpoint("llama", tmp_path)
    expected = run(tmp_path, mixed_job()).tokens()
    executors = []
    engine = device_engine(
        tmp_path, monkeypatch, made=executors.append, max_num_batched_tokens=48, max_num_seqs=6
    )
    execute = executors[0].execute
    bad = mixed_job()[2].prompt_token_ids

    class Failing:
        def wait(self):
            raise RuntimeError("the device says no")

    def failing(step):
        pending = execute(step)
        starts = any(np.array_equal(new.token_ids, bad) for new in step.new_sequences)
        return Failing() if starts else pending

    executors[0].execute = failing
    results = {result.request_id: result for result in engine.run(mixed_job())}
    failed = {id for id, result in results.items() if result.error is not None}
    assert failed == {"r2"}
    for id in results.keys() - failed:
        assert [o.token_ids for o in results[id].outputs] == expected[id]


def test_copies_of_tokens_and_blocks(tmp_path):
    """All sources are read before anything is written."""
    make_checkpoint("llama", tmp_path)
    model = load_model(open_checkpoint(tmp_path), dtype=torch.float32, max_positions=128)
    executor = DeviceExecutor(
        model, [KVGroup(None, 4)], [0, 0, 0], block_size=32, max_num_seqs=2, max_model_len=128,
        vocab_size=97, graphs=None,
    )  # fmt: skip
    before = torch.randn(executor._kv.parts[0][0].shape)
    executor._kv.parts[0][0].copy_(before)
    blocks = torch.tensor([[0, 1], [1, 2]]).T
    tokens = torch.tensor([[3 * 32 + 5, 1], [7, 40]]).T
    step = type("S", (), {"num_swapped": 0})()
    executor._apply(step, {"copied_blocks.0": blocks})
    expected = before.clone()
    expected[:, :, 1], expected[:, :, 2] = before[:, :, 0], before[:, :, 1]
    assert torch.equal(executor._kv.parts[0][0], expected)
    executor._apply(step, {"copied_tokens": tokens})
    now = expected.clone()
    now[:, :, 0, :, 1] = expected[:, :, 3, :, 5]
    now[:, :, 1, :, 8] = expected[:, :, 0, :, 7]
    assert torch.equal(executor._kv.parts[0][0], now)


@pytest.mark.parametrize("limit", [1, 7, 40, 512])
def test_sizes_of_graphs_reach_their_limit(limit):
    sizes = graph_tokens(limit)
    assert sizes == sorted(set(sizes)) and sizes[-1] >= limit
    assert len(sizes) < 2 or sizes[-2] < limit


def test_a_layout_fills_up_with_zeros_and_is_aligned():
    layout = Layout({"a": (np.int32, (3,)), "b": (np.int64, (5,)), "c": (np.int32, (0, 8))}, 16)
    buffer = np.full(layout.end, 255, np.uint8)
    arrays = {
        "a": np.array([1, -2], np.int32),
        "b": np.arange(5),
        "c": np.zeros((0, 8), np.int32),
    }
    layout.write(arrays, buffer)
    views = layout.views(torch.from_numpy(buffer))
    assert views["a"].tolist() == [1, -2, 0] and views["b"].tolist() == [0, 1, 2, 3, 4]
    assert views["c"].shape == (0, 8)
    assert all(view.data_ptr() % 8 == 0 for view in views.values())
    assert (buffer[:16] == 255).all()


def test_settings_of_a_gpu():
    sizes = {"context_length": 4096, "free_memory_bytes": 10**9}
    found = EngineConfig().resolve(**sizes, num_gpus=1)
    assert (found.device, found.dtype, found.look_ahead) == ("cuda", "bfloat16", 1)
    assert found.max_num_batched_tokens == 2048 and found.kv_cache_bytes == 10**9
    found = EngineConfig(device="cpu").resolve(**sizes, num_gpus=1)
    assert (found.device, found.dtype, found.look_ahead) == ("cpu", "float32", 0)
    assert found.max_num_batched_tokens == 512 and found.kv_cache_bytes == 10**9 // 2
    assert EngineConfig().resolve(**sizes) == found
    kept = EngineConfig(dtype="float32", look_ahead=0, max_num_batched_tokens=300)
    found = kept.resolve(**sizes, num_gpus=1)
    assert (found.dtype, found.look_ahead, found.max_num_batched_tokens) == ("float32", 0, 300)
    with pytest.raises(ConfigError, match="no NVIDIA card"):
        EngineConfig(device="cuda").resolve(**sizes)
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        EngineConfig(device="tpu").check()
