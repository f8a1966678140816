"""SegmentCache: who holds which blocks, and what leaves first. No engine."""

import numpy as np

from batchwright.kv.block_table import BlockTable
from batchwright.kv.groups import KVGroup
from batchwright.kv.segments import SegmentCache, segment_blocks
from batchwright.prompt_layout import PromptLayout, Segment

A, B, C = (Segment.of(range(n), ((p, n),)) for n, p in [(5, 0), (4, 5), (9, 9)])


def layout(*segments):
    return PromptLayout(segments, ((20, 1),))


def cache_with(*segments):
    """A cache in which these are encoded, each for one waiting row."""
    table = BlockTable(KVGroup(None, 20), block_size=4, max_num_seqs=2, max_model_len=64)
    cache = SegmentCache(table)
    for segment in segments:
        cache.wait(layout(segment))
        encode(cache, table, segment)
    return cache, table


def encode(cache, table, segment):
    assert cache.want(layout(segment)) == [segment]
    cache.begin_encoding(segment)
    slot, zero = np.array([0], np.int32), np.zeros(1, np.int32)
    table.grow(slot, zero, np.array([segment.num_tokens], np.int32))
    cache.keep(segment, 0)
    assert cache.want(layout(segment)) == [segment], "not before the Step that computes it"
    assert cache.is_encoding(segment)
    table.release(0)
    cache.begin_schedule()
    assert cache.want(layout(segment)) == []
    cache.begin_schedule()
    table.pool.check_integrity(np.concatenate((table.held(), cache.held())))


def test_slots_of_imported_tokens_follow_the_order_of_the_layout():
    cache, _ = cache_with(A, B, C)
    assert cache.num_encoded == 3
    slots = cache.kv_slots(layout(C, A), 0)
    assert len(set(slots.tolist())) == 14
    assert (slots[:9] == cache.kv_slots(layout(C), 0)).all()
    assert (slots[9:] == cache.kv_slots(layout(A), 0)).all()
    assert (cache.kv_slots(layout(C, A), 8) == slots[8:]).all()
    assert (cache.kv_slots(layout(C, A), 11) == slots[11:]).all()
    assert len(cache.kv_slots(layout(C, A), 14)) == 0


def test_unneeded_segments_leave_first_then_those_wanted_longest_ago():
    cache, table = cache_with(A, B, C)
    assert cache.num_evictable() == segment_blocks([A, B, C], 4) == 2 + 1 + 3
    cache.no_longer_wait(layout(B))
    assert cache.evict(1, unneeded_only=True) == 1
    assert cache.evict(9, unneeded_only=True) == 0
    cache.want(layout(A))
    cache.begin_schedule()
    assert cache.evict(1) == 3, "C was wanted longer ago than A"
    assert cache.want(layout(C)) == [C]
    assert cache.evict(1) == 2
    assert table.pool.num_free == 20


def test_what_is_wanted_now_or_still_held_by_its_encoder_stays():
    cache, table = cache_with(A, B)
    assert cache.want(layout(A)) == []
    assert cache.num_evictable() == 1
    cache.begin_schedule()
    held = table.pool
    blocks = cache.kv_slots(layout(A), 0)[::4] // 4
    held.share(blocks)
    assert cache.evict(9) == 1
    held.release(blocks)
    assert cache.evict(9) == 2


def test_a_segment_that_nobody_wants_and_that_is_nowhere_is_forgotten():
    cache, _ = cache_with(A)
    assert cache
    cache.no_longer_wait(layout(A))
    assert cache, "it stays as long as there is room"
    cache.clear()
    assert not cache
    cache.wait(layout(B), 2)
    cache.want(layout(B))
    cache.begin_encoding(B)
    cache.no_longer_wait(layout(B))
    cache.no_longer_wait(layout(B))
    assert cache, "its encoder runs"
    cache.abandon(B)
    assert not cache
