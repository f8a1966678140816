"""What becomes of a job when a rank fails: one clear error, no hang, and no process is left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from batchwright.config import EngineConfig
from batchwright.engine import Engine
from batchwright.errors import RankError
from batchwright.exec.local import LocalExecutor
from batchwright.llm import build_engine
from batchwright.tensor_parallel import followers as followers_module
from batchwright.tensor_parallel.executor import TensorParallelExecutor
from batchwright.tensor_parallel.followers import Followers
from batchwright.weights.checkpoint import open_checkpoint
from tests.engine.harness import NoTokenizer, mixed_job
from tests.models.reference import make_checkpoint
from tests.running_job import is_running

pytestmark = pytest.mark.cpu


def divided_engine(path: Path) -> tuple[Engine, list[int]]:
    """An engine of two processes of its own, and the ids of the others."""
    make_checkpoint("llama", path, intermediate_size=38)
    config = EngineConfig(device="cpu", num_threads=1, max_num_seqs=4, tensor_parallel_size=2)
    engine, _ = build_engine(open_checkpoint(path), NoTokenizer(), config)
    executor = engine._executor
    assert isinstance(executor, TensorParallelExecutor)
    return engine, [one.process.pid for one in executor._followers._followers]


def test_a_killed_rank_ends_the_job(tmp_path):
    engine, pids = divided_engine(tmp_path)
    results = engine.run(mixed_job(max_tokens=60))
    assert next(results).error is None
    os.kill(pids[0], signal.SIGKILL)
    start_s = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 1 was ended by signal 9 .*finished rows are kept"):
        list(results)
    assert time.monotonic() - start_s < 30
    with pytest.raises(RankError, match="signal 9"):  # and for ever after
        list(engine.run(mixed_job()))
    engine.close()


def test_between_gpus_ranks_do_not_meet_again(tmp_path, monkeypatch):
    """What NCCL and graphs hold is not made anew: the others end, and the run."""
    engine, pids = divided_engine(tmp_path)
    monkeypatch.setattr(followers_module, "CAUSE_S", 0.1)
    monkeypatch.setattr(engine._executor._followers, "_on_gpu", True)

    def fail(self, step):
        raise MemoryError("no room")

    monkeypatch.setattr(LocalExecutor, "_forward", fail)
    with pytest.raises(RankError, match=r"^rank 0 failed: MemoryError: no room; all 2 ranks"):
        list(engine.run(mixed_job()))
    assert not any(map(is_running, pids))


def test_a_follower_killed_after_a_step_was_given_up_ends_the_job(tmp_path, monkeypatch):
    engine, pids = divided_engine(tmp_path)
    forward = LocalExecutor._forward
    num_failed = 0

    def fail_twice(self, step):
        nonlocal num_failed
        num_failed += 1
        if num_failed == 2:
            os.kill(pids[0], signal.SIGKILL)
        if num_failed <= 2:
            raise ValueError("a bug")
        return forward(self, step)

    monkeypatch.setattr(LocalExecutor, "_forward", fail_twice)
    start_s = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 1 was ended by signal 9"):
        list(engine.run(mixed_job()))
    assert num_failed == 2 and time.monotonic() - start_s < 30


def test_an_interrupt_within_a_step_ends_the_others(tmp_path, monkeypatch):
    engine, pids = divided_engine(tmp_path)

    def interrupt(self, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalExecutor, "_forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(engine.run(mixed_job()))
    assert not any(map(is_running, pids))
    with pytest.raises(RankError, match="load it again"):
        list(engine.run(mixed_job()))


def test_a_rank_that_cannot_load_says_why(tmp_path):
    make_checkpoint("llama", tmp_path, intermediate_size=38)
    config = EngineConfig(device="cpu", tensor_parallel_size=2).resolve(
        context_length=256, free_memory_bytes=10**9
    )
    followers = Followers(2, on_gpu=False)
    followers.load(tmp_path / "nowhere", config)
    with pytest.raises(RankError, match=r"^rank 1 failed: ModelNotFoundError: .*nowhere"):
        followers.start()


def test_a_rank_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(followers_module, "PROGRAM", "import nothing_of_this_name")
    with pytest.raises(RankError, match=r"^rank \d ended with status 1 .*nothing_of_this_name"):
        Followers(3, on_gpu=False)


def test_an_engine_that_is_forgotten_ends_its_processes(tmp_path):
    engine, pids = divided_engine(tmp_path)
    directory = engine._executor._followers._directory
    engine.close()
    assert not any(map(is_running, pids)) and not directory.exists()


def test_memory_and_threads_are_each_ranks():
    sizes = {"context_length": 4096, "free_memory_bytes": 2**30}
    alone = EngineConfig(device="cpu").resolve(**sizes)
    two = EngineConfig(device="cpu", tensor_parallel_size=2).resolve(**sizes)
    assert two.kv_cache_bytes == alone.kv_cache_bytes // 2
    assert two.num_threads == max(alone.num_threads // 2, 1)
    on_gpus = EngineConfig(tensor_parallel_size=2).resolve(**sizes, num_gpus=2)
    assert on_gpus.kv_cache_bytes == 2**30
    for settings, num_gpus, words in [
        ({"tensor_parallel_size": 4}, 2, "finds 2 NVIDIA cards"),
        ({"tensor_parallel_size": 0}, 0, "tensor_parallel_size is 0, must be at least 1"),
        ({"tensor_parallel_size": 2.0}, 0, "must be a whole number"),
    ]:
        with pytest.raises(Exception, match=words):
            EngineConfig(**settings).resolve(**sizes, num_gpus=num_gpus)
