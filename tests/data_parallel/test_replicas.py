"""Replicas in processes of their own: every kind of row has the answer of one process; deaths."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from batchwright.config import EngineConfig
from batchwright.data_parallel import replicas as replicas_module
from batchwright.data_parallel.engine import ReplicatedEngine
from batchwright.errors import ConfigError, ReplicaError
from batchwright.llm import LLM
from batchwright.opened_model import open_model
from batchwright.request import Request, Result, SamplingParams
from batchwright.server.shared_engine import SharedEngine
from batchwright.structured.spec import regex
from tests.engine.harness import mixed_job, request
from tests.running_job import is_running, make_model

pytestmark = pytest.mark.cpu

SETTINGS = {"device": "cpu", "num_threads": 1, "max_num_seqs": 4, "kv_cache_bytes": 2**20}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("replicas") / "model")


@pytest.fixture(scope="module")
def alone(model) -> LLM:
    return LLM(model, **SETTINGS)


@pytest.fixture(scope="module")
def pair(model) -> LLM:
    llm = LLM(model, data_parallel_size=2, **SETTINGS)
    yield llm
    llm.engine.close()


def replicated(model: Path, size: int = 2) -> tuple[LLM, ReplicatedEngine]:
    llm = LLM(model, data_parallel_size=size, **SETTINGS)
    assert isinstance(llm.engine, ReplicatedEngine)
    return llm, llm.engine


def facts(result: Result) -> object:
    """All of a result that does not depend on what ran beside it, bits included."""
    values = dataclasses.asdict(dataclasses.replace(result, num_cached_tokens=0, error=None))
    if result.score is not None:
        values["score"] = result.score.token_logprobs.tobytes(), result.score.is_greedy
    if result.embedding is not None:
        values["embedding"] = result.embedding.tobytes()
    for part, value in zip(result.parts, values["parts"], strict=True):
        value["num_cached_tokens"] = 0 * part.num_cached_tokens
    error = result.error
    return values, error and (error.code, error.message, error.param)


def same(first: list[Result], second: list[Result]) -> bool:
    by_id = [{result.request_id: facts(result) for result in run} for run in (first, second)]
    assert len(first) == len(by_id[0])  # each once
    return by_id[0] == by_id[1]


def test_generated_rows(alone, pair):
    prompts = [f"w{i % 5} " * 40 + f"w{i}" for i in range(3, 25)]
    params = [
        SamplingParams(temperature=0.9, max_tokens=7 + i, n=1 + i % 3, logprobs=2)
        for i in range(len(prompts))
    ]
    first, second = (llm.generate(prompts, params) for llm in (alone, pair))
    assert same(first, second)
    assert len({output.text for result in first for output in result.outputs}) > 30


def test_rows_that_share_and_rows_that_are_refused(alone, pair):
    rows = [*mixed_job(), request("bad", [96, 97]), request("long", [5] * 300)]
    first, second = (list(llm.engine.run(rows)) for llm in (alone, pair))
    assert same(first, second)
    assert sorted(result.request_id for result in second if result.error) == ["bad", "long"]


def test_scores_and_embeddings(alone, pair):
    pairs = [(f"w{i} w{i + 1}", f"w{i % 7} w3") for i in range(3, 13)]
    assert same(alone.score(pairs), pair.score(pairs))
    texts = [f"w{i} w{i % 4} " * 9 for i in range(3, 13)]
    for pooling in ("mean", "last"):
        assert same(alone.embed(texts, pooling), pair.embed(texts, pooling))


def test_structured_output(alone, pair):
    params = SamplingParams(temperature=1.0, max_tokens=9, grammar=regex(r"( ?w\d+){1,4}"))
    prompts = [f"w{i} w{i}" for i in range(3, 13)]
    first, second = (llm.generate(prompts, params) for llm in (alone, pair))
    assert same(first, second)
    texts = [result.outputs[0].text for result in second]
    assert all(1 <= text.count("w") <= 4 for text in texts) and len({*texts}) > 5


def test_rows_made_of_parts(alone, pair):
    def row(id: str, first: int) -> Request:
        parts = tuple(request(f"{id}/{i}", [first, i, 5], 6) for i in range(3, 6))
        return Request(id=id, prompt_token_ids=np.empty(0, np.int32), parts=parts)

    rows = [row("a", 7), row("b", 8)]
    assert same(list(alone.engine.run(rows)), list(pair.engine.run(rows)))


def test_both_replicas_work_and_are_counted(pair):
    engine, before = pair.engine, pair.engine.stats.num_generated_tokens
    busy = set()
    give = engine._give

    def watched(number, rows):
        busy.add(number)
        give(number, rows)

    engine._give = watched
    try:
        pair.generate(
            [f"w{i}" for i in range(3, 23)], SamplingParams(max_tokens=5, ignore_eos=True)
        )
    finally:
        del engine._give
    assert busy == {0, 1}
    assert engine.stats.num_generated_tokens - before == 100


def test_replicas_are_pinned_and_share_the_weights(pair):
    replicas = pair.engine.replicas
    for pid, place in zip(replicas.pids, replicas.places, strict=True):
        assert os.sched_getaffinity(pid) == set(place.cores)
        assert "memfd:batchwright-weights" in Path(f"/proc/{pid}/maps").read_text()
    assert "memfd:batchwright-weights" not in Path("/proc/self/maps").read_text()


def test_single_calls_join_the_rows_of_a_job(alone, pair):
    shared = SharedEngine(pair.engine, max_calls=4)
    rows = mixed_job(max_tokens=40)
    for row in rows:
        shared.add(row)
    call = shared.submit(dataclasses.replace(request("call", [5, 6, 7], 4), urgent=True))
    dropped = shared.submit(request("dropped", [8, 9], 100))
    results = shared.step()
    shared.withdraw(dropped)
    while shared.num_unfinished:
        results += shared.step()
    assert same(results, list(alone.engine.run(rows)))
    assert same([call.result.result(0)], list(alone.engine.run([request("call", [5, 6, 7], 4)])))
    for row in rows:
        shared.add(row)
    shared.step()
    shared.abandon()
    assert pair.engine.num_unfinished == 0


def test_results_closed_early_leave_a_usable_engine(alone, pair):
    rows = mixed_job(max_tokens=40)
    results = pair.engine.run(rows)
    next(results)
    results.close()
    assert pair.engine.num_unfinished == 0
    assert same(list(pair.engine.run(rows)), list(alone.engine.run(rows)))


def test_rows_of_a_killed_replica_are_answered_by_the_other(model, alone, caplog):
    _, engine = replicated(model)
    rows = mixed_job(max_tokens=60)
    results = engine.run(rows)
    first = next(results)
    os.kill(engine.replicas.pids[0], signal.SIGKILL)
    assert same([first, *results], list(alone.engine.run(rows)))
    assert "replica 0 was ended by signal 9 (without memory left" in caplog.text
    assert "1 of 2 replicas go on" in caplog.text
    engine.close()


def test_when_all_are_killed_the_run_ends_and_no_process_is_left(model):
    _, engine = replicated(model)
    results = engine.run(mixed_job(max_tokens=100))
    next(results)
    for pid in engine.replicas.pids:
        os.kill(pid, signal.SIGKILL)
    start_s = time.monotonic()
    with pytest.raises(ReplicaError, match=r"signal 9 .* none of 2 replicas .* is left"):
        list(results)
    assert time.monotonic() - start_s < 30
    engine.close()
    assert not any(map(is_running, engine.replicas.pids))


def test_an_engine_that_is_closed_ends_its_processes(model):
    _, engine = replicated(model)
    directory = engine.replicas._directory
    assert all(map(is_running, engine.replicas.pids)) and directory.exists()
    engine.close()
    assert not any(map(is_running, engine.replicas.pids)) and not directory.exists()


def test_a_replica_that_does_not_start_says_why(model, monkeypatch):
    monkeypatch.setattr(replicas_module, "PROGRAM", "import nothing_of_this_name")
    with pytest.raises(
        ReplicaError, match=r"replica \d ended with status 1 .*nothing_of_this_name"
    ):
        LLM(model, data_parallel_size=2, **SETTINGS)


def test_memory_and_threads_are_each_replicas():
    sizes = {"context_length": 4096, "free_memory_bytes": 2**30}
    alone = EngineConfig(device="cpu").resolve(**sizes)
    two = EngineConfig(device="cpu", data_parallel_size=2).resolve(**sizes)
    assert two.kv_cache_bytes == alone.kv_cache_bytes // 2
    assert two.num_threads == max(alone.num_threads // 2, 1)
    for settings, num_gpus, words in [
        ({"data_parallel_size": 2}, 1, "data_parallel_size is 2, replicas are for the CPU"),
        ({"data_parallel_size": 0}, 0, "data_parallel_size is 0, must be at least 1"),
        ({"data_parallel_size": 2.0}, 0, "must be a whole number"),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2}, 0, "leave one of them out"),
    ]:
        with pytest.raises(ConfigError, match=words):
            EngineConfig(**settings).resolve(**sizes, num_gpus=num_gpus)


def test_answers_do_not_depend_on_the_number_of_replicas(model):
    identities = [
        open_model(str(model), {"device": "cpu", "data_parallel_size": size}).identity()
        for size in (1, 2)
    ]
    assert identities[0] == identities[1]
