"""Trials of settings on the real scheduler: what they count, what is impossible, what agrees."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from batchwright.config import EngineConfig
from batchwright.job.trials import KnownJob, Trials
from batchwright.plan.advise.batch_queue import BatchService
from batchwright.plan.advise.step_costs import (
    activation_bytes,
    batch_service,
    decode_mix,
    prompt_s,
)
from batchwright.plan.cost import CostModel, Hardware, RateCurve
from batchwright.plan.estimate import find_savings
from batchwright.plan.hardware import device_hardware, find_device
from batchwright.plan.job_rows import JobRows
from batchwright.plan.model_shapes import find_model_shape
from batchwright.request import Request, SamplingParams
from tests.plan.test_cost import SHAPE

CURVE = RateCurve((4, 64), (1e3, 1e4))
HARDWARE = Hardware(
    name="by hand",
    num_threads=1,
    layers=CURVE,
    head=CURVE,
    ceiling_flops_per_s=1e4,
    attention_flops_per_s=1e5,
    kv_bytes_per_s=1e6,
    memory_bytes_per_s=1e6,
    step_s=0.05,
)
COST = CostModel(SHAPE, HARDWARE)


def job(num_rows: int = 40, num_prompt: int = 40, num_output: int = 30) -> KnownJob:
    rows = JobRows()
    random = np.random.default_rng(0)
    for row in range(num_rows):
        tokens = random.integers(0, 7, num_prompt).astype(np.int32)
        params = SamplingParams(max_tokens=num_output, ignore_eos=True)
        rows.add(
            Request(id=str(row), prompt_token_ids=tokens, params=params),
            num_prompt + num_output,
            row,
        )
    columns = rows.columns()
    savings = find_savings(rows, columns, block_size=32, horizon=4096)
    return KnownJob(rows, columns, savings, columns.most_output)


def simulation(known: KnownJob, **settings) -> Trials:
    config = EngineConfig(num_threads=1, **settings).resolve(
        context_length=1024, free_memory_bytes=10**8
    )
    return Trials(known, SHAPE, config, lambda threads: COST, 4)


def test_a_trial_by_hand() -> None:
    """One row at a time: a prompt of 40 tokens and 29 decode steps each."""
    known = job(num_rows=3)
    run = simulation(known, max_num_seqs=1)
    found = run.trial(run.own)
    assert found is not None
    tables, row = CostModel(SHAPE, HARDWARE), 0.0
    row = prompt_s(tables, 40, 512)
    for context in range(40, 69):
        row += decode_mix(tables, 1, context).total_s
    assert found.seconds == pytest.approx(3 * row)
    assert found.tokens_per_s == pytest.approx(3 * 70 / (3 * row))
    assert found.token_s == pytest.approx(3 * row / 90)
    assert found.max_running == 1
    assert found.kv_tokens == 96  # 69 tokens, in blocks of 32


def test_what_cannot_be() -> None:
    run = simulation(job(), max_num_seqs=8)
    assert run.trial(dataclasses.replace(run.own, max_num_batched_tokens=4)) is None
    assert simulation(job(), kv_tokens=64).trial(simulation(job(), kv_tokens=64).own) is None


def test_the_profile_is_that_of_batching() -> None:
    profile = simulation(job()).profile()
    assert [point.batch_size for point in profile] == [1, 2, 4, 8, 16, 32, 64]
    throughput = [point.tokens_per_s for point in profile]
    assert throughput == sorted(throughput)
    latency = [point.token_s for point in profile]
    assert latency[0] < latency[-1]
    assert profile[-1].kv_tokens == 40 * 96


@pytest.mark.parametrize("size", [4, 16])
def test_memory_of_the_profile_suffices(size: int) -> None:
    """With KV memory cut down to what the profile says, a batch of that size loses nothing."""
    known = job()
    free = simulation(known, max_num_seqs=size)
    point = next(one for one in free.profile() if one.batch_size == size)
    tight = simulation(known, max_num_seqs=size, kv_tokens=point.kv_tokens)
    found = tight.trial(tight.own)
    assert found is not None
    assert found.tokens_per_s == pytest.approx(point.tokens_per_s)
    short = simulation(known, max_num_seqs=size, kv_tokens=point.kv_tokens // 2)
    less = short.trial(short.own)
    assert less is not None
    assert less.tokens_per_s < 0.99 * point.tokens_per_s  # so the line above could have failed


def test_larger_blocks_share_less_and_round_up_more() -> None:
    """40 of 50 prompt tokens are shared: 32 of them in blocks of 32, none in blocks of 64."""
    rows = JobRows()
    for row in range(20):
        tokens = np.array([7] * 40 + [row + 10] * 10, np.int32)
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        rows.add(Request(id=str(row), prompt_token_ids=tokens, params=params), 55, row)
    columns = rows.columns()
    savings = find_savings(rows, columns, block_size=32, horizon=4096)
    run = simulation(KnownJob(rows, columns, savings, columns.most_output), max_num_seqs=4)
    found = {size: run.trial(dataclasses.replace(run.own, block_size=size)) for size in (32, 64)}
    assert found[64].seconds > 1.2 * found[32].seconds
    assert (found[32].kv_tokens, found[64].kv_tokens) == (32 + 4 * 32, 4 * 64)
    assert run._savings_in(32).cached.sum() == 19 * 32
    assert run._savings_in(64).cached.sum() == 0


def test_parts_of_a_job() -> None:
    known = job()
    assert known.first_part(1).tolist() == list(range(40))
    assert known.first_part(4).tolist() == list(range(10))
    run = simulation(known, max_num_seqs=1)
    whole, part = run.trial(run.own), run.trial(run.own, 4)
    assert whole is not None and part is not None
    assert part.seconds == pytest.approx(whole.seconds / 4)


def test_a_service_is_linear_between_its_ends() -> None:
    service = batch_service(COST, num_prompt=40, context=50, num_rows=64, budget=512)
    for rows in (1, 64):
        step_s = service.row_token_s * rows + service.step_s
        assert step_s == pytest.approx(decode_mix(COST, rows, 50).total_s)
    assert service.prompt_s + service.prefill_s == pytest.approx(prompt_s(COST, 40, 512))
    assert isinstance(service, BatchService)
    assert prompt_s(COST, 40, 16) > prompt_s(COST, 40, 512)  # more Steps


def test_the_parts_of_a_step() -> None:
    shape = find_model_shape("Llama-3-8B")
    cost = CostModel(shape, device_hardware(find_device("H100"), shape, 2), 2, 2)
    few, many = decode_mix(cost, 1, 500), decode_mix(cost, 256, 2000)
    for mix in (few, many):
        assert mix.fixed_s == pytest.approx(1e-3)
        assert max(mix.compute_s, mix.memory_s) <= mix.busy_s
    assert few.compute_s < 0.1 * few.memory_s  # reading the weights is all there is
    assert many.compute_s > 50 * few.compute_s
    # 8.03e9 parameters at 2 bytes, less the embeddings, which are not read whole
    weights_s = 2 * (shape.num_params - 128256 * 4096) / cost.hardware.memory_bytes_per_s
    assert few.memory_s == pytest.approx(weights_s, rel=0.02)


def test_memory_of_a_step() -> None:
    # 10 tokens of (2 + 4 + 4 x 2) elements of 2 bytes, and logits of 3 rows of 7 in fp32
    assert activation_bytes(SHAPE, 10, 3, 2) == 10 * 14 * 2 + 4 * 3 * 7
