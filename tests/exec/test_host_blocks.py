"""Keys and values that go to the host and come back, on the CPU device, or on a card."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from batchwright.config import EngineConfig, ResolvedConfig
from batchwright.errors import ConfigError
from batchwright.exec.device import host_blocks
from batchwright.exec.device.host_blocks import HostBlocks
from batchwright.exec.machine_cost import with_useful_swap
from batchwright.exec.memory import check_room_on_host
from batchwright.plan import hardware
from batchwright.plan.hardware import BUS_SHARE
from batchwright.plan.model_shapes import find_model_shape
from batchwright.request import Request, SamplingParams
from tests.engine.harness import mixed_job, run
from tests.engine.test_parity import bytes_of_a_block
from tests.exec.test_device import DEVICE, device_engine, tokens_of
from tests.models.reference import make_checkpoint
from tests.sched.harness import start_what_fits_now


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def random_kv() -> torch.Tensor:
    return torch.randn(3, 2, 11, 2, 4, 8, device=DEVICE)


@pytest.mark.parametrize("blocks_at_once", [1, 3, 100])
def test_blocks_come_back_as_they_were(blocks_at_once, monkeypatch) -> None:
    """Through buffers for one block and for all; slabs of two blocks, the last one shorter."""
    block_bytes = 3 * 2 * 2 * 4 * 8 * 4
    monkeypatch.setattr(host_blocks, "BUFFER_BYTES", blocks_at_once * block_bytes)
    monkeypatch.setattr(host_blocks, "SLAB_BYTES", 2 * block_bytes)
    kv = random_kv()
    before, host = kv.clone(), HostBlocks(kv, 7)
    host.save(kv, ids(0, 1, 2, 3, 4, 5), [6, 5, 4, 3, 2, 1])
    kv[:, :, :6] = torch.nan
    host.save(kv, ids(), [])
    host.load(kv, [1, 6, 5, 4], ids(10, 0, 7, 2))
    for block, was in {10: 5, 0: 0, 7: 1, 2: 2, 6: 6, 8: 8, 9: 9}.items():
        assert torch.equal(kv[:, :, block], before[:, :, was])
    assert kv[:, :, [1, 3, 4, 5]].isnan().all()


def test_a_block_may_go_out_and_come_in_in_one_step() -> None:
    kv = random_kv()
    before, host = kv.clone(), HostBlocks(kv, 2)
    host.save(kv, ids(4), [0])
    host.save(kv, ids(9, 2), [1, 0])
    host.load(kv, [0, 1], ids(9, 4))
    assert torch.equal(kv[:, :, 9], before[:, :, 2])
    assert torch.equal(kv[:, :, 4], before[:, :, 9])


def with_host(num_blocks: int):
    """For `device_engine`: room on the host for so many blocks."""
    return lambda groups: [dataclasses.replace(groups[0], num_host_blocks=num_blocks)]


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("num_host_blocks", [2, 100])
def test_preempted_rows_go_on(num_host_blocks, look_ahead, tmp_path, monkeypatch) -> None:
    make_checkpoint("llama", tmp_path)
    job = mixed_job(max_tokens=40)
    expected = run(tmp_path, job).tokens()
    engine = device_engine(
        tmp_path,
        monkeypatch,
        regroup=with_host(num_host_blocks),
        look_ahead=look_ahead,
        kv_cache_bytes=9 * bytes_of_a_block(tmp_path),
        max_num_batched_tokens=48,
        max_num_seqs=6,
    )
    start_what_fits_now(engine._scheduler)
    assert tokens_of(engine, job) == expected
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_swapped_blocks > 0


def resolved(num_gpus: int, **settings) -> ResolvedConfig:
    return EngineConfig(**settings).resolve(
        context_length=4096, free_memory_bytes=1 << 30, num_gpus=num_gpus
    )


def test_room_on_the_host_is_counted_in_blocks() -> None:
    config = resolved(1, swap_space_bytes=1000)
    (group,) = config.kv_groups([None], [128])
    assert group.num_host_blocks == 7
    assert resolved(1).kv_groups([None], [128])[0].num_host_blocks == 0


def test_where_there_can_be_no_room_on_the_host() -> None:
    with pytest.raises(ConfigError, match=r"is for a GPU.*--kv-cache-memory"):
        resolved(0, swap_space_bytes=1000)
    with pytest.raises(ConfigError, match="must be at least 1"):
        resolved(1, swap_space_bytes=0)
    with pytest.raises(ConfigError, match=r"sliding window.*--swap-space"):
        resolved(1, swap_space_bytes=1000).kv_groups([None, 64], [128, 128])
    with pytest.raises(ConfigError, match=r"the host has \d+ free"):
        check_room_on_host(1 << 60)


@pytest.mark.parametrize(("bus_share", "is_kept"), [(BUS_SHARE, True), (1e-6, False)])
def test_no_room_is_taken_where_computing_again_is_cheaper(bus_share, is_kept, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(hardware, "BUS_SHARE", bus_share)
    config, shape = resolved(1, swap_space_bytes=1 << 30), find_model_shape("Llama-3-8B")
    found = with_useful_swap(config, shape)
    assert found == (config if is_kept else dataclasses.replace(config, swap_space_bytes=0))


def alternating_job() -> list[Request]:
    """Rows of two prompts in turns, which memory holds one of."""
    rng = np.random.default_rng(5)
    stems = rng.integers(3, 90, (2, 150))
    return [
        Request(
            id=str(index),
            prompt_token_ids=np.append(stems[index % 2], [5, 6, 7 + index]).astype(np.int32),
            params=SamplingParams(max_tokens=6, temperature=0.0),
        )
        for index in range(8)
    ]


def test_a_prefix_comes_back(tmp_path, monkeypatch) -> None:
    make_checkpoint("llama", tmp_path)
    expected = run(tmp_path, alternating_job()).tokens()
    engines = [
        device_engine(
            tmp_path,
            monkeypatch,
            regroup=with_host(num_host_blocks),
            order="fcfs",
            kv_cache_bytes=7 * bytes_of_a_block(tmp_path),
            max_num_seqs=1,
            max_num_batched_tokens=64,
        )
        for num_host_blocks in (0, 20)
    ]
    for engine in engines:
        assert tokens_of(engine, alternating_job()) == expected
    without, with_room = (engine.stats for engine in engines)
    assert without.num_swapped_blocks == 0 < with_room.num_swapped_blocks
    assert with_room.num_cached_tokens == 6 * 128 > without.num_cached_tokens
