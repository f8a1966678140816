"""PrefixCache with its tree and tables: what is matched, adopted, kept and evicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from batchwright.kv.block_table import BlockTable
from batchwright.kv.groups import KVGroup
from batchwright.kv.prefix_cache import ABSENT, PrefixCache
from batchwright.plan.prefix_tree import PrefixTree
from tests.sched.symbolic import fingerprints

NEVER = None  # nothing comes back from a host: see tests/sched/test_swap.py
BLOCK_SIZE = 3
NUM_SLOTS = 3
MAX_LEN = 30


@dataclass(eq=False)
class Row:
    prompt: list[int]
    nodes: np.ndarray
    limit: int  # first position it must compute
    slot: int | None = None
    num_computed: int = 0
    write_from: int = 0


def first_block(window: int | None, num_blocks: int, limit: int) -> int:
    """First block that the token after `num_blocks` blocks can see, from the definition."""
    next_position = min(num_blocks * BLOCK_SIZE, limit)
    seen = [
        position // BLOCK_SIZE
        for position in range(num_blocks * BLOCK_SIZE)
        if window is None or position > next_position - window
    ]
    return min(seen, default=num_blocks)


class PrefixCacheMachine(RuleBasedStateMachine):
    """Rows start on what is resident, compute the rest of their prompt in chunks, give up, end.

    Memory is a plain array per group: each KV slot holds the fingerprint of its prefix.
    """

    def __init__(self):
        super().__init__()
        self.prompts: list[list[int]] = [[]]
        self.rows: list[Row] = []

    @initialize(
        windows=st.sampled_from([[None], [2], [4], [None, 3], [None, 5, 8]]),
        num_blocks=st.lists(st.integers(4, 25), min_size=3, max_size=3),
    )
    def start(self, windows, num_blocks):
        self.windows = windows
        self.tree = PrefixTree(BLOCK_SIZE)
        self.tables = [
            BlockTable(
                KVGroup(window, num),
                block_size=BLOCK_SIZE,
                max_num_seqs=NUM_SLOTS,
                max_model_len=MAX_LEN,
            )
            for window, num in zip(windows, num_blocks)
        ]
        self.cache = PrefixCache(self.tree, self.tables)
        self.memory = [np.zeros(num * BLOCK_SIZE, np.int64) for num in num_blocks]

    def pick(self, place: int, *, is_running: bool) -> Row | None:
        rows = [row for row in self.rows if (row.slot is not None) == is_running]
        return rows[place % len(rows)] if rows else None

    @rule(
        place=st.integers(0, 20),
        num_shared=st.integers(0, MAX_LEN),
        own=st.lists(st.integers(0, 2), max_size=9),
        limit=st.integers(0, MAX_LEN),
        is_last=st.booleans(),
    )
    def add(self, place, num_shared, own, limit, is_last):
        prompt = (self.prompts[place % len(self.prompts)][:num_shared] + own)[:MAX_LEN] or [0]
        self.prompts.append(prompt)
        nodes = self.tree.add("", np.array(prompt, np.int32))
        last = len(prompt) - 1
        self.rows.append(Row(prompt, nodes, last if is_last else limit % len(prompt)))

    @rule(place=st.integers(0, 99))
    def start_row(self, place):
        row = self.pick(place, is_running=False)
        taken = {r.slot for r in self.rows}
        slot = next((slot for slot in range(NUM_SLOTS) if slot not in taken), None)
        if row is None or slot is None:
            return
        num_matched = self.cache.match(row.nodes, row.limit)
        assert num_matched == self.longest_match(row)
        matched = row.nodes[:num_matched]
        for group, (table, window) in enumerate(zip(self.tables, self.windows)):
            first = first_block(window, num_matched, row.limit)
            blocks = self.cache._blocks[group, matched[first:]]
            num_only = np.count_nonzero(table.pool.ref_counts[blocks] == 1)
            adopted = self.cache.adopted(group, matched, row.limit)
            assert len(adopted) == len(blocks)
            refs = self.cache._tables[group].pool.ref_counts[adopted]
            assert np.count_nonzero(refs == 1) == num_only
        self.cache.adopt(slot, matched, row.limit, make_room=NEVER)
        row.slot, row.write_from = slot, num_matched * BLOCK_SIZE
        row.num_computed = min(row.write_from, row.limit)
        self.cache.drop(self.tree.start(row.nodes))

    def longest_match(self, row: Row) -> int:
        for num_blocks in range(len(row.nodes), -1, -1):
            starts = [first_block(window, num_blocks, row.limit) for window in self.windows]
            if all(
                (self.cache._blocks[group, row.nodes[start:num_blocks]] != ABSENT).all()
                for group, start in enumerate(starts)
            ):
                return num_blocks
        raise AssertionError("zero blocks always match")

    @rule(place=st.integers(0, 99), num_tokens=st.integers(1, 9))
    def compute(self, place, num_tokens):
        row = self.pick(place, is_running=True)
        if row is None or row.num_computed == len(row.prompt):
            return
        start, end = row.num_computed, min(row.num_computed + num_tokens, len(row.prompt))
        slots, starts, ends = (
            np.array([value], np.int32) for value in (row.slot, max(start, row.write_from), end)
        )
        for group, table in enumerate(self.tables):
            table.release_behind_window(slots, np.array([start], np.int32))
            need = int(table.num_blocks_to_grow(slots, starts, ends).sum())
            if need > table.pool.num_free:
                self.evict(group, need - table.pool.num_free)
            if need > table.pool.num_free:
                return
        for group, table in enumerate(self.tables):
            table.grow(slots, starts, ends)
            positions = np.arange(starts[0], end, dtype=np.int32)
            places = table.kv_slots(np.full(len(positions), row.slot), positions)
            self.memory[group][places] = fingerprints(row.prompt)[starts[0] : end]
        row.num_computed = end
        self.check_seen(row, start)
        self.cache.insert(row.slot, row.nodes, start // BLOCK_SIZE, end // BLOCK_SIZE)

    def check_seen(self, row: Row, start: int) -> None:
        for table, window, memory in zip(self.tables, self.windows, self.memory):
            first = 0 if window is None else max(0, start - window + 1)
            positions = np.arange(first, row.num_computed, dtype=np.int32)
            seen = memory[table.kv_slots(np.full(len(positions), row.slot), positions)]
            assert seen.tolist() == fingerprints(row.prompt)[first : row.num_computed]

    @rule(place=st.integers(0, 99))
    def give_up(self, place):
        row = self.pick(place, is_running=True)
        if row is None:
            return
        self.tree.wait_again(row.nodes)
        self.cache.insert(row.slot, row.nodes, 0, row.num_computed // BLOCK_SIZE)
        self.leave(row)

    @rule(place=st.integers(0, 99), is_running=st.booleans())
    def end(self, place, is_running):
        row = self.pick(place, is_running=is_running)
        if row is None:
            return
        if is_running:
            self.leave(row)
        else:
            self.cache.drop(self.tree.start(row.nodes))
        self.tree.forget(row.nodes)
        self.rows.remove(row)

    def leave(self, row: Row) -> None:
        for table in self.tables:
            table.release(row.slot)
        row.slot = None

    @rule(group=st.integers(0, 2), num_blocks=st.integers(0, 9))
    def evict(self, group, num_blocks):
        group %= len(self.tables)
        pool, users, depth = self.tables[group].pool, self.tree.num_waiting, self.tree.depth
        evictable = self.evictable(group)
        assert self.cache.num_evictable(group) == len(evictable)
        num_free = pool.num_free
        self.cache.evict(group, num_blocks)
        assert pool.num_free == num_free + min(num_blocks, len(evictable))
        kept = set(self.evictable(group))
        gone = [node for node in evictable if node not in kept]
        rank = {node: (users[node], -depth[node]) for node in evictable}
        assert max((rank[n] for n in gone), default=(0,)) <= min(
            (rank[n] for n in kept), default=(np.inf,)
        )
        assert (self.cache._blocks[:, gone] == ABSENT).all(), "gone from every group"

    def evictable(self, group: int) -> list[int]:
        counts = self.tables[group].pool.ref_counts
        blocks = self.cache._blocks[group].tolist()
        return [n for n, block in enumerate(blocks) if block != ABSENT and counts[block] == 1]

    @invariant()
    def books_are_right(self):
        if not hasattr(self, "cache"):
            return
        expected = {}
        for row in self.rows:
            expected.update(zip(row.nodes.tolist(), fingerprints(row.prompt)[BLOCK_SIZE - 1 :: 3]))
        for group, (table, memory) in enumerate(zip(self.tables, self.memory)):
            held = np.concatenate((table.held(), self.cache.held(group)))
            table.pool.check_integrity(held)
            resident = np.flatnonzero(self.cache._blocks[group] != ABSENT)
            assert (self.tree.num_waiting[resident] > 0).all(), "kept for nobody"
            last = self.cache._blocks[group, resident] * BLOCK_SIZE + BLOCK_SIZE - 1
            assert memory[last].tolist() == [expected[node] for node in resident.tolist()]

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        while self.rows:
            self.end(0, self.rows[0].slot is not None)
        assert all(table.pool.num_free == table.pool.num_blocks for table in self.tables)
        assert len(self.tree) == 0


class TestPrefixCache(PrefixCacheMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=40)


@pytest.mark.slow
class TestPrefixCacheForLong(PrefixCacheMachine.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=80, derandomize=False)


def test_rows_that_never_ran_may_end_after_the_tree_grew() -> None:
    tree = PrefixTree(1)
    table = BlockTable(KVGroup(None, 4), block_size=1, max_num_seqs=1, max_model_len=4)
    cache = PrefixCache(tree, [table])
    rows = [tree.add("", np.array([row], np.int32)) for row in range(3000)]
    for nodes in rows:
        cache.drop(tree.start(nodes))
        tree.forget(nodes)
    assert table.pool.num_free == 4 and len(tree) == 0


def one_group(window: int | None) -> tuple[PrefixTree, BlockTable, PrefixCache]:
    tree = PrefixTree(BLOCK_SIZE)
    table = BlockTable(
        KVGroup(window, 8), block_size=BLOCK_SIZE, max_num_seqs=2, max_model_len=MAX_LEN
    )
    return tree, table, PrefixCache(tree, [table])


def test_a_prompt_may_be_matched_after_the_tree_grew() -> None:
    tree, _, cache = one_group(None)
    nodes = tree.add("", np.arange(3000 * BLOCK_SIZE, dtype=np.int32))
    assert cache.match(nodes, len(nodes) * BLOCK_SIZE - 1) == 0


@pytest.mark.parametrize(("window", "num_matched"), [(4, 2), (5, 0), (None, 0)])
def test_a_prefix_may_lack_the_blocks_that_nobody_sees(window, num_matched) -> None:
    """The token after two blocks of three sees the second alone in a window of four."""
    tree, table, cache = one_group(window)
    nodes = tree.add("", np.zeros(7, np.int32), 2)
    tree.start(nodes)
    table.grow(*(np.array([value], np.int32) for value in (0, 0, 6)))
    cache.insert(0, nodes, 0, 2)
    assert cache.match(nodes, 6) == 2
    cache.drop(nodes[:1])
    assert cache.match(nodes, 6) == num_matched


def test_what_is_used_again_last_goes_first_and_ends_before_beginnings() -> None:
    tree = PrefixTree(BLOCK_SIZE)
    table = BlockTable(KVGroup(None, 9), block_size=BLOCK_SIZE, max_num_seqs=3, max_model_len=9)
    uses: dict[int, int] = {}
    cache = PrefixCache(tree, [table], lambda nodes: np.array([uses[n] for n in nodes.tolist()]))
    paths = []
    for slot, token in enumerate((10, 20, 30)):
        nodes = tree.add("", np.full(9, token, np.int32), num_rows=2)
        one = np.array([slot], np.int32)
        table.grow(one, np.array([0], np.int32), np.array([9], np.int32))
        cache.insert(slot, nodes, 0, 3)
        table.release(slot)
        paths.append(nodes.tolist())
    for nodes, use in zip(paths, (5, 9, 1)):
        uses |= dict.fromkeys(nodes, use)
    for num_evicted, (path, left) in enumerate([(1, 2), (1, 1), (1, 0), (0, 2), (0, 1)], 1):
        cache.evict(0, 1)
        assert table.pool.num_free == num_evicted
        assert cache.match(np.array(paths[path], np.int32), 9) == left
    assert cache.match(np.array(paths[2], np.int32), 9) == 3
