"""Blocks that go to the host and come back: what is computed again, and what is forgotten.

The symbolic executor copies fingerprints to a host of its own, so a block that is saved before it
is written, or loaded from a place that has been given away, is found by the rows that see it.
"""

from __future__ import annotations

import numpy as np
import pytest

from batchwright.kv.block_table import BlockTable
from batchwright.kv.groups import KVGroup
from batchwright.kv.host_memory import HostMemory
from batchwright.kv.prefix_cache import PrefixCache
from batchwright.plan.prefix_tree import PrefixTree
from batchwright.request import FinishReason
from tests.sched.harness import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    Harness,
    family,
    start_what_fits_now,
)
from tests.sched.test_scheduler import crowded_job, prefill_tokens


def alternating(num_host_blocks: int, *, num_rounds: int = 4, num_stems: int = 2) -> Harness:
    """Rows of two prefixes in turns, one at a time, in memory that holds one prefix."""
    harness = Harness([None], [9], budget=40, max_num_seqs=1, num_host_blocks=num_host_blocks)
    for index in range(num_rounds * num_stems):
        harness.add(family(index, [index % num_stems] * 24 + [3, 4, 5], 3, end=False))
    return harness


@pytest.mark.parametrize("num_host_blocks", [0, 100])
def test_what_memory_has_no_place_for_is_computed_once(num_host_blocks: int) -> None:
    harness = alternating(num_host_blocks)
    harness.run()
    once = prefill_tokens([m.request.prompt_token_ids.tolist() for m in harness.members])
    num_prompt = sum(m.num_prompt_tokens - m.num_cached_tokens for m in harness.members)
    if num_host_blocks:
        assert num_prompt == once
        assert harness.scheduler.stats.num_swapped_blocks > 0
    else:
        assert num_prompt > 2 * once
        assert harness.scheduler.stats.num_swapped_blocks == 0


def test_a_full_host_keeps_what_is_used_soonest() -> None:
    """Three prefixes of six blocks and a host for six: the one that comes next is kept."""
    harness = alternating(6, num_stems=3)
    harness.run()
    cached = [m.num_cached_tokens for m in harness.members]
    assert sum(cached) > 0
    nothing = alternating(0, num_stems=3)
    nothing.run()
    assert sum(cached) > sum(m.num_cached_tokens for m in nothing.members)


def preempted(num_host_blocks: int, look_ahead: int = 0, sharing: bool = True) -> Harness:
    """Two rows that start together and have no room for the outputs of both."""
    harness = Harness(
        [None],
        [11],
        budget=40,
        max_num_seqs=2,
        look_ahead=look_ahead,
        sharing=sharing,
        num_host_blocks=num_host_blocks,
    )
    start_what_fits_now(harness.scheduler)
    for index in range(2):
        harness.add(family(index, [index] * 9, 24, end=False))
    return harness


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("look_ahead", [0, 1])
def test_a_preempted_row_goes_on_where_it_was(look_ahead: int, sharing: bool) -> None:
    without = preempted(0, look_ahead, sharing)
    without.run()
    assert without.scheduler.stats.num_recomputed_tokens > 8
    harness = preempted(100, look_ahead, sharing)
    harness.run()
    assert harness.scheduler.stats.num_preemptions > 0
    assert harness.scheduler.stats.num_recomputed_tokens == 0


def test_a_host_without_room_changes_nothing() -> None:
    without, harness = preempted(0), preempted(1)
    without.run()
    harness.run()
    assert harness.num_recomputed_tokens == without.num_recomputed_tokens > 0


def run_until_parked(harness: Harness) -> None:
    for _ in range(60):
        harness.round()
        if len(harness.scheduler.books.parking.held()):
            return
    raise AssertionError("nothing was parked")


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.STOP])
def test_a_row_that_ends_while_it_is_parked_leaves_nothing(reason: FinishReason) -> None:
    harness = preempted(100)
    run_until_parked(harness)
    (waiting,) = (m for m in harness.unfinished() if m.slot < 0)
    harness.end(waiting, reason)
    assert not len(harness.scheduler.books.parking.held())
    harness.check()
    harness.run()


def test_after_a_failed_step_nothing_on_the_host_is_trusted() -> None:
    harness = preempted(100)
    run_until_parked(harness)
    harness.outstanding.clear()
    harness.scheduler.requeue_running()
    books = harness.scheduler.books
    assert not len(books.parking.held()) and books.host.num_free == books.host.num_blocks
    harness.check()
    harness.run()


def test_crowded_jobs_use_the_host_in_every_way() -> None:
    """Of all sizes, and less is computed again than without one."""
    swapped = recomputed = without = 0
    for seed in range(24):
        for num_host_blocks in (3, 300):
            harness = crowded_job(seed, num_host_blocks=num_host_blocks)
            harness.run()
            swapped += harness.scheduler.stats.num_swapped_blocks
        recomputed += harness.scheduler.stats.num_recomputed_tokens
        harness = crowded_job(seed, num_host_blocks=0)
        harness.run()
        without += harness.scheduler.stats.num_recomputed_tokens
    assert swapped > 500
    assert recomputed < without / 2


def test_a_block_may_be_away_while_one_below_it_is_not() -> None:
    """One row keeps the second block of a prompt, another kept the first, now on the host."""
    tree = PrefixTree(BLOCK_SIZE)
    table = BlockTable(
        KVGroup(None, 4, 2), block_size=BLOCK_SIZE, max_num_seqs=3, max_model_len=MAX_MODEL_LEN
    )
    host = HostMemory(2, 4)
    cache = PrefixCache(tree, [table], host=host)
    nodes = tree.add("", np.arange(2 * BLOCK_SIZE, dtype=np.int32), 3)
    tree.start(nodes)
    for slot, num_blocks in ((0, 2), (1, 1)):
        table.grow(ids(slot), ids(0), ids(num_blocks * BLOCK_SIZE))
    cache.insert(0, nodes, 1, 2)
    cache.insert(1, nodes, 0, 1)
    (away,) = table.table[1, :1].tolist()
    table.release(1)
    cache.evict(0, 1)
    assert cache.match(nodes, 99) == 2 and cache.num_on_host(nodes) == 1
    assert cache.adopted(0, nodes, 99).tolist() == [table.table[0, 1]]
    assert host.take_changes()[0].tolist() == [[away, 0]]
    cache.adopt(2, nodes, 99, make_room=lambda num: None)
    assert table.table[2, 1] == table.table[0, 1]
    assert host.take_changes()[1].tolist() == [[0, table.table[2, 0]]]
    assert not set(table.table[2, :2].tolist()) & set(table.table[0, :1].tolist())
    table.pool.check_integrity(np.concatenate((table.held(), cache.held(0))))
    host.check_integrity(cache.held_on_host())


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_block_that_was_read_is_free_from_the_next_step_on() -> None:
    """Saves come before loads in a Step: a save to its place would be what is loaded."""
    host = HostMemory(2, 10)
    saved = host.save(ids(4, 5))
    assert host.take_changes()[0].tolist() == [[4, saved[0]], [5, saved[1]]]
    host.load(saved[:1], ids(7))
    assert host.num_free == 0
    saves, loads = host.take_changes()
    assert (saves.tolist(), loads.tolist()) == ([], [[saved[0], 7]])
    assert host.num_free == 1
    host.check_integrity(saved[1:])


def test_what_is_forgotten_before_it_is_saved_is_not_copied() -> None:
    host = HostMemory(2, 10)
    saved = host.save(ids(4, 5))
    host.forget(saved[:1])
    again = host.save(ids(6))
    assert host.take_changes()[0].tolist() == [[5, saved[1]], [6, again[0]]]
    assert host.num_saved == 2


def test_what_a_step_is_about_to_load_cannot_be_saved_by_it() -> None:
    host = HostMemory(2, 10)
    host.load(host.save(ids(5)), ids(3))
    assert host.is_coming(ids(2, 3)).tolist() == [False, True]
    with pytest.raises(AssertionError):
        host.save(ids(3))
    host.take_changes()
    host.save(ids(3))
