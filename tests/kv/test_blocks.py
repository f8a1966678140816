"""BlockPool against a multiset of references."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchwright.kv.blocks import BlockPool

places = st.lists(st.integers(0, 10**6), min_size=1, max_size=8)


class BlockPoolMachine(RuleBasedStateMachine):
    """References are taken and given back in any grouping, an id several times in one call too."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.held: list[int] = []

    @rule(num=st.integers(0, 12))
    def allocate(self, num):
        num = min(num, self.pool.num_free)
        ids = self.pool.allocate(num).tolist()
        assert len(set(ids)) == num and not set(ids) & set(self.held), "given away twice"
        self.held += ids

    @precondition(lambda self: self.held)
    @rule(places=places)
    def share(self, places):
        ids = [self.held[place % len(self.held)] for place in places]
        self.pool.share(np.array(ids, np.int32))
        self.held += ids

    @precondition(lambda self: self.held)
    @rule(places=places)
    def release(self, places):
        ids = [self.held.pop(place % len(self.held)) for place in places if self.held]
        self.pool.release(np.array(ids, np.int32))

    @invariant()
    def books_are_right(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(np.array(self.held, np.int32))
        counts = Counter(self.held)
        assert self.pool.num_free == self.pool.num_blocks - len(counts)
        assert all(self.pool.ref_counts[block] == count for block, count in counts.items())

    def teardown(self):
        if hasattr(self, "pool"):
            self.pool.release(np.array(self.held, np.int32))
            ids = self.pool.allocate(self.pool.num_blocks)
            assert sorted(ids.tolist()) == list(range(self.pool.num_blocks)), "blocks were lost"


class TestBlockPool(BlockPoolMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=30)


@pytest.mark.slow
class TestBlockPoolForLong(BlockPoolMachine.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=60, derandomize=False)


def array(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def test_blocks_freed_last_are_used_first() -> None:
    pool = BlockPool(8)
    first = pool.allocate(3)
    pool.allocate(2)
    pool.release(first)
    assert pool.allocate(3).tolist() == first.tolist()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool: pool.allocate(3),
        lambda pool: pool.allocate(-1),
        lambda pool: pool.share(array(3)),
        lambda pool: pool.release(array(3)),
        lambda pool: pool.release(array(0, 0)),
    ],
    ids=["too many", "negative", "share a free one", "free a free one", "free twice"],
)
def test_misuse_is_caught(misuse) -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(AssertionError):
        misuse(pool)


def lose_a_free_block(pool: BlockPool) -> None:
    pool.num_free -= 1


def free_a_held_block(pool: BlockPool) -> None:
    pool._free[0] = 0


def free_one_twice(pool: BlockPool) -> None:
    pool._free[0] = pool._free[1]


@pytest.mark.parametrize("held", [(0,), (0, 1, 1), (0, 0), (0, 2)])
def test_integrity_check_notices_wrong_references(held) -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    pool.check_integrity(array(0, 1))
    with pytest.raises(AssertionError):
        pool.check_integrity(array(*held))


@pytest.mark.parametrize("damage", [lose_a_free_block, free_a_held_block, free_one_twice])
def test_integrity_check_notices_a_broken_free_list(damage) -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity(held)
