"""Keys that rows share: followed through a simulated run, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batchwright.clock import VirtualClock
from batchwright.exec.sim import SimExecutor
from batchwright.kv.groups import KVGroup
from batchwright.plan.cost import CostModel, SharedReads
from batchwright.plan.shared_keys import SharedKeys, StepCosts
from batchwright.sched.scheduler import Scheduler
from batchwright.step import Step
from tests.plan.simulated import BLOCK_SIZE, NoText, rows
from tests.plan.test_cost import HARDWARE, SHAPE, make_step

LOAD_S, FLOPS_S = 2.0, 0.48  # of a key; see test_cost.py
SLOW = replace(HARDWARE, kv_bytes_per_s=12.0)


def attention_s(step: Step, shared: SharedReads, rows_per_load: int = 4) -> float:
    cost = CostModel(SHAPE, SLOW, rows_per_load=rows_per_load)
    return cost.parts(step, [shared]).attention


def test_shared_keys_are_loaded_once_for_several_rows():
    """8 rows of 10 keys, 6 of them the same: loaded twice for 4 rows each, 4 keys of their own."""
    step = make_step([(9, 10)] * 8, [])
    alone = 8 * 10 * LOAD_S
    assert attention_s(step, SharedReads(0, 0)) == pytest.approx(alone)
    shared = attention_s(step, SharedReads(8 * 6, 2 * 6))
    assert shared == pytest.approx(8 * 4 * LOAD_S + max(2 * 6 * LOAD_S, 8 * 6 * FLOPS_S))
    in_one = attention_s(step, SharedReads(8 * 6, 6))
    assert in_one == pytest.approx(8 * 4 * LOAD_S + 8 * 6 * FLOPS_S), "FLOPs are not saved"


def test_rows_that_compute_anyway_gain_nothing():
    step = make_step([(0, 10)], [])
    assert attention_s(step, SharedReads(20, 10)) == attention_s(step, SharedReads(0, 0))


def shared_by_tables(tables: dict[int, list[int]], rows_per_load: int) -> SharedReads:
    """The same counted anew from all tables."""
    blocks = np.array([block for table in tables.values() for block in table], np.int64)
    _, users = np.unique(blocks, return_counts=True)
    users = users[users > 1]
    return SharedReads(
        int(users.sum()) * BLOCK_SIZE, int((-(-users // rows_per_load)).sum()) * BLOCK_SIZE
    )


@pytest.mark.parametrize("num_blocks", [30, 400])
@pytest.mark.parametrize("rows_per_load", [1, 3, 100])
def test_what_is_followed_is_what_the_tables_say(num_blocks, rows_per_load):
    """In a run with shared prompts, forks and, with few blocks, preemptions."""
    from batchwright.engine import Engine

    scheduler = Scheduler(
        [KVGroup(None, num_blocks)],
        block_size=BLOCK_SIZE,
        max_num_seqs=6,
        max_num_batched_tokens=32,
        max_model_len=256,
    )
    keys, tables, seen = SharedKeys(BLOCK_SIZE, rows_per_load), {}, []

    class Watching:
        def __init__(self):
            self.executor = SimExecutor(VirtualClock())

        def execute(self, step):
            for slot in step.finished_slots.tolist():
                tables.pop(slot, None)
            for slot, index, block in zip(*step.table_updates[0], strict=True):
                table = tables.setdefault(int(slot), [])
                table[index:] = [int(block), *table[index + 1 :]]
            found = keys.follow(step, 0)
            if rows_per_load > 1:
                assert found == shared_by_tables(tables, rows_per_load)
            seen.append(found)
            return self.executor.execute(step)

        def close(self):
            pass

    prompts = [[7] * 20 + [100 + i % 3] * 9 + [200 + i] * (i % 7) for i in range(24)]
    engine = Engine(scheduler, Watching(), NoText(), max_model_len=256, vocab_size=10**6)
    assert all(result.error is None for result in engine.run(rows(prompts, 12, n=2)))
    if num_blocks == 30:
        assert engine.stats.num_preemptions > 0
    most = max(found.num_reads for found in seen)
    assert (most == 0) == (rows_per_load == 1)
    assert all(found.num_loads <= found.num_reads for found in seen)


def test_costs_of_steps_fall_where_rows_share():
    """Two rows begin with the same two blocks."""
    step = make_step([(11, 12)] * 2, [])
    update = step.table_updates[0]._replace(
        slots=np.array([0, 0, 0, 1, 1, 1], np.int32),
        indices=np.array([0, 1, 2, 0, 1, 2], np.int32),
        block_ids=np.array([5, 6, 7, 5, 6, 8], np.int32),
    )
    first = replace(step, table_updates=(update,))
    sharing = CostModel(SHAPE, SLOW, rows_per_load=2)
    costs = StepCosts(sharing, block_size=4)
    expected = sharing.seconds(step) - 2 * 8 * LOAD_S + 8 * LOAD_S
    assert costs.seconds(first) == pytest.approx(expected)
    assert costs.seconds(step) == pytest.approx(expected), "tables stay"
    gone = replace(make_step([(11, 12)], []), finished_slots=np.array([1], np.int32))
    assert costs.seconds(gone) == pytest.approx(sharing.seconds(make_step([(11, 12)], [])))
    alone = CostModel(SHAPE, SLOW)
    assert StepCosts(alone, block_size=4).seconds(first) == alone.seconds(step)
