"""Simulated runs in several orders: counts that follow from the workload, the course in time."""

from __future__ import annotations

import numpy as np
import pytest

from batchwright.errors import ConfigError
from batchwright.job.sim_job import EngineLimits, device_machine, simulate_orders
from batchwright.order_runs import OrderRun, unique_prompt_tokens
from batchwright.plan.job_rows import JobRows
from batchwright.plan.model_shapes import find_model_shape
from batchwright.request import Request, SamplingParams
from batchwright.synthetic import Part, Workload, make_workload, parse_lengths, parse_tree

SHAPE = find_model_shape("Llama-3-8B")


def workload(num_rows: int = 60, tree: str = "5x200", max_tokens: int | None = None) -> Workload:
    part = Part(parse_lengths("20-60"), parse_lengths("50~0.5"), parse_tree(tree))
    return make_workload((part,), num_rows, max_tokens=max_tokens)


def runs_of(job: Workload, *names: str, overlap: float = 0.0, **limits) -> dict[str, OrderRun]:
    machine = device_machine("H100", SHAPE, job, EngineLimits(**limits), overlap=overlap)
    return {run.order: run for run in simulate_orders(job, machine, names)}


def test_with_memory_to_spare_every_order_computes_each_unique_token_once() -> None:
    for run in runs_of(workload()).values():
        assert run.prefill_tokens == run.unique_tokens
        assert run.preemptions == run.recomputed_tokens == 0


def test_without_sharing_all_prompt_tokens_are_computed() -> None:
    job = workload()
    (run,) = runs_of(job, "fcfs", prefix_sharing=False).values()
    assert run.prefill_tokens == job.columns.num_prompt.sum() > run.unique_tokens


def test_where_memory_is_short_orders_differ_and_memory_is_full() -> None:
    runs = runs_of(workload(200, "40x600"), "fcfs", "prefix_dfs", kv_tokens=5000)
    assert runs["prefix_dfs"].prefill_tokens < runs["fcfs"].prefill_tokens
    assert runs["prefix_dfs"].seconds < runs["fcfs"].seconds
    assert runs["fcfs"].peak_kv_use > 0.95
    assert runs["fcfs"].peak_kv_tokens <= 5000


def test_tokens_and_time_follow_from_the_workload() -> None:
    job = workload(max_tokens=500)
    (run,) = runs_of(job, "fcfs").values()
    num_output = int(job.output.sum())
    num_tokens = int(job.columns.num_prompt.sum()) + num_output
    assert run.tokens_per_s * run.seconds == pytest.approx(num_tokens)
    assert run.output_tokens_per_s * run.seconds == pytest.approx(num_output)


def test_a_course_adds_up_to_the_run() -> None:
    job = workload()
    (run,) = runs_of(job, "fcfs").values()
    course = run.course
    assert len(course.kv_use) * course.interval_s == pytest.approx(run.seconds)
    assert sum(course.prompt_tokens_per_s) * course.interval_s == pytest.approx(run.prefill_tokens)
    fed = int((job.output - 1).sum())  # the last token of a row is not fed back
    assert sum(course.output_tokens_per_s) * course.interval_s == pytest.approx(fed)
    assert np.mean(course.compute_use) == pytest.approx(run.compute_use)
    assert np.mean(course.bandwidth_use) == pytest.approx(run.bandwidth_use)
    assert 0 < max(course.kv_use) <= run.peak_kv_use
    assert 0 < run.compute_use < 1 and 0 < run.bandwidth_use < 1


def test_overlap_makes_a_run_shorter_and_never_by_more_than_half() -> None:
    job = workload(200)
    alone, overlapped = (
        runs_of(job, "fcfs", overlap=overlap)["fcfs"].seconds for overlap in (0.0, 1.0)
    )
    assert alone / 2 <= overlapped < alone


@pytest.mark.parametrize("overlap", [0.0, 1.0])
def test_no_order_is_faster_than_the_work_that_must_be_done(overlap: float) -> None:
    """Unique prompt tokens and decodes at the best rate; every key that decodes read."""
    job = workload(200, "10x300")
    machine = device_machine("H100", SHAPE, job, EngineLimits(kv_tokens=40_000))
    hardware = machine.cost.hardware
    prompts, outputs = job.columns.num_prompt, job.output
    num_tokens = unique_prompt_tokens(job.rows, np.arange(200), 32) + int((outputs - 1).sum())
    compute_s = num_tokens * SHAPE.layer_flops_per_token / hardware.layers.best
    keys = int((prompts * (outputs - 1) + outputs * (outputs - 1) // 2).sum())
    memory_s = keys * SHAPE.kv_elements_per_token() * 2 / hardware.kv_bytes_per_s
    least = max(compute_s, memory_s) if overlap else compute_s + memory_s
    for run in runs_of(job, overlap=overlap, kv_tokens=40_000).values():
        assert run.seconds > least


def test_a_row_that_never_fits_is_an_error() -> None:
    with pytest.raises(ConfigError, match="have room for 64"):
        runs_of(workload(), "fcfs", kv_tokens=64)


def test_unknown_orders_and_devices_are_errors() -> None:
    with pytest.raises(ConfigError):
        runs_of(workload(), "best")
    with pytest.raises(ConfigError, match="A100-80G"):
        device_machine("TPU", SHAPE, workload(), EngineLimits())


def rows_of(*prompts: list[int]) -> JobRows:
    rows = JobRows()
    for place, prompt in enumerate(prompts):
        ids = np.array(prompt, np.int32)
        rows.add(Request(id=str(place), prompt_token_ids=ids, params=SamplingParams()), 99, place)
    return rows


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([], 0),
        ([[1, 1, 1, 1, 2]], 5),
        ([[1, 1, 1, 1, 2], [1, 1, 1, 1, 3, 3]], 4 + 1 + 2),
        ([[1] * 8, [1] * 8, [1] * 8], 8 + 1 + 1),  # the last token again, for its logits
        ([[1] * 4, [1] * 8], 8),
        ([[1, 1, 2], [1, 1, 3]], 6),  # less than a block is not shared
    ],
)
def test_unique_tokens_by_hand(prompts: list[list[int]], expected: int) -> None:
    rows = rows_of(*prompts)
    assert unique_prompt_tokens(rows, np.arange(len(rows)), 4) == expected
