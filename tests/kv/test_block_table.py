"""BlockTable: what a slot sees through its blocks is what was written for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchwright.kv.block_table import BlockTable, ragged_ranges
from batchwright.kv.groups import KVGroup, blocks_per_sequence, split_blocks, windows_of_layers

BLOCK_SIZE = 4
NUM_SLOTS = 4
MAX_LEN = 40


class BlockTableMachine(RuleBasedStateMachine):
    """Slots grow, fork, adopt each other's full blocks, forget and die; memory is a plain array.

    `contents[slot]` is what the slot's sequence wrote or inherited, by position. The table that is
    read is an executor's copy, made of the changes alone.
    """

    @initialize(window=st.sampled_from([None, 1, 3, 4, 5, 9]), num_blocks=st.integers(4, 40))
    def start(self, window, num_blocks):
        self.table = BlockTable(
            KVGroup(window, num_blocks),
            block_size=BLOCK_SIZE,
            max_num_seqs=NUM_SLOTS,
            max_model_len=MAX_LEN,
        )
        self.window = window
        self.memory = np.full(num_blocks * BLOCK_SIZE, -1)
        self.copy_of_table = np.full((NUM_SLOTS, MAX_LEN // BLOCK_SIZE), -1)
        self.contents: dict[int, list[int]] = {}
        self.num_written = 0

    def free_slot(self) -> int | None:
        return next((slot for slot in range(NUM_SLOTS) if slot not in self.contents), None)

    def pick(self, place: int) -> int:
        return sorted(self.contents)[place % len(self.contents)]

    def apply_changes(self) -> int:
        """Bring the executor's copy up to date; returns the number of new entries."""
        update, copies = self.table.take_changes()
        self.copy_of_table[update.slots, update.indices] = update.block_ids
        assert len(set(copies[:, 1].tolist())) == len(copies)
        blocks = self.memory.reshape(-1, BLOCK_SIZE)
        blocks[copies[:, 1]] = blocks[copies[:, 0]]
        return len(update.slots)

    @precondition(lambda self: len(self.contents) < NUM_SLOTS)
    @rule()
    def occupy(self):
        self.contents[self.free_slot()] = []

    @precondition(lambda self: self.contents)
    @rule(lengths=st.lists(st.integers(0, 9), min_size=NUM_SLOTS, max_size=NUM_SLOTS))
    def write(self, lengths):
        slots = np.array(sorted(self.contents), np.int32)
        starts = np.array([len(self.contents[slot]) for slot in slots], np.int32)
        ends = np.minimum(starts + lengths[: len(slots)], MAX_LEN).astype(np.int32)
        slots, starts, ends = (a[ends > starts] for a in (slots, starts, ends))
        if not len(slots):
            return
        self.table.release_behind_window(slots, starts)
        need = int(self.table.num_blocks_to_grow(slots, starts, ends).sum())
        num_free = self.table.pool.num_free
        if need > num_free:
            return
        self.table.grow(slots, starts, ends)
        assert not self.table.num_blocks_to_grow(slots, starts, ends).any()
        assert self.table.pool.num_free >= num_free - need
        assert self.apply_changes() == need, "it took other blocks than it counted"
        for slot, start, end in zip(slots.tolist(), starts.tolist(), ends.tolist()):
            positions = np.arange(start, end, dtype=np.int32)
            values = np.arange(self.num_written, self.num_written + end - start)
            self.num_written += end - start
            self.memory[self.table.kv_slots(np.full(end - start, slot), positions)] = values
            self.contents[slot] += values.tolist()

    @precondition(lambda self: self.contents and self.free_slot() is not None)
    @rule(place=st.integers(0, 9))
    def fork(self, place):
        parent, child = self.pick(place), self.free_slot()
        self.table.fork(parent, child)
        self.contents[child] = list(self.contents[parent])

    @precondition(lambda self: self.contents and self.free_slot() is not None)
    @rule(place=st.integers(0, 9), num_blocks=st.integers(0, 9))
    def adopt(self, place, num_blocks):
        owner, child = self.pick(place), self.free_slot()
        start = int(self.table.start[owner])
        end = min(len(self.contents[owner]) // BLOCK_SIZE, start + num_blocks)
        if end < start or (start and end * BLOCK_SIZE < len(self.contents[owner])):
            return  # a windowed owner has lost what an earlier end would need
        self.table.adopt(child, start, self.table.table[owner, start:end].copy())
        self.contents[child] = self.contents[owner][: end * BLOCK_SIZE]

    @precondition(lambda self: self.contents)
    @rule(place=st.integers(0, 9))
    def release(self, place):
        slot = self.pick(place)
        self.table.release(slot)
        del self.contents[slot]

    @invariant()
    def books_are_right(self):
        if not hasattr(self, "table"):
            return
        self.table.pool.check_integrity(self.table.held())
        self.apply_changes()
        for slot, contents in self.contents.items():
            first_seen = 0 if self.window is None else max(0, len(contents) - self.window + 1)
            positions = np.arange(first_seen, len(contents))
            blocks = self.copy_of_table[slot, positions // BLOCK_SIZE]
            seen = self.memory[blocks * BLOCK_SIZE + positions % BLOCK_SIZE]
            assert seen.tolist() == contents[first_seen:], "wrong memory is seen"
            assert self.table.end[slot] == -(-len(contents) // BLOCK_SIZE)

    def teardown(self):
        if not hasattr(self, "table"):
            return
        slots = np.array(sorted(self.contents), np.int32)
        ends = np.array([len(self.contents[slot]) for slot in slots.tolist()], np.int32)
        self.table.release_behind_window(slots, ends)
        for slot, end in zip(slots.tolist(), ends.tolist()):
            num_held = self.table.end[slot] - self.table.start[slot]
            seen = end if self.window is None else min(end, self.window - 1)
            assert num_held <= -(-seen // BLOCK_SIZE) + 1, "blocks nobody can see are kept"
            self.table.release(slot)
        assert self.table.pool.num_free == self.table.pool.num_blocks


class TestBlockTable(BlockTableMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=30)


@pytest.mark.slow
class TestBlockTableForLong(BlockTableMachine.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=60, derandomize=False)


def array(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def table_with(num_blocks: int, window: int | None = None) -> BlockTable:
    return BlockTable(
        KVGroup(window, num_blocks), block_size=4, max_num_seqs=4, max_model_len=MAX_LEN
    )


def test_forks_copy_the_block_they_write_to_and_no_other() -> None:
    table = table_with(8)
    table.grow(array(0), array(0), array(6))
    table.fork(0, 1)
    table.take_changes()
    assert table.num_blocks_to_grow(array(0, 1), array(6, 6), array(7, 7)).tolist() == [1, 1]
    table.grow(array(1), array(6), array(7))
    update, copies = table.take_changes()
    assert copies.tolist() == [[1, 2]]
    assert [column.tolist() for column in update] == [[1], [1], [2]]
    # Alone with its block now, the parent writes where it is.
    assert table.num_blocks_to_grow(array(0), array(6), array(7)).tolist() == [0]


def test_a_fork_at_a_block_border_copies_nothing() -> None:
    table = table_with(8)
    table.grow(array(0), array(0), array(8))
    table.fork(0, 1)
    table.grow(array(0, 1), array(8, 8), array(9, 9))
    assert not len(table.take_changes()[1])


@pytest.mark.parametrize(
    ("window", "position", "first_kept"),
    [(4, 3, 0), (4, 6, 0), (4, 7, 1), (5, 7, 0), (5, 8, 1), (1, 4, 1), (9, 11, 0), (9, 12, 1)],
)
def test_a_block_is_dropped_with_its_last_visible_token(window, position, first_kept) -> None:
    table = table_with(8, window)
    table.grow(array(0), array(0), array(16))
    table.release_behind_window(array(0), array(position))
    assert table.start[0] == first_kept
    assert table.pool.num_free == 4 + first_kept


def test_ragged_ranges_flatten_in_order() -> None:
    rows, entries = ragged_ranges(array(7, 5, 9), array(3, 0, 8), array(2, 0, 3))
    assert rows.tolist() == [7, 7, 9, 9, 9] and entries.tolist() == [3, 4, 8, 9, 10]


@pytest.mark.parametrize("window", [1, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("chunk", [1, 3, 4, 6, 9])
def test_blocks_per_sequence_is_the_most_ever_held(window, chunk) -> None:
    """Chunks of every size up to the largest, from every start: enough, and never twice enough."""
    length, most = 36, 0
    for first in range(1, chunk + 1):
        table, position, step = table_with(40, window), 0, first
        while position < length:
            end = min(position + step, length)
            table.release_behind_window(array(0), array(position))
            table.grow(array(0), array(position), array(end))
            most = max(most, int(table.end[0] - table.start[0]))
            position, step = end, chunk
    bound = blocks_per_sequence(window, length, 4, chunk)
    assert most <= bound <= most + 1


def test_blocks_per_sequence_without_window_or_with_a_large_one() -> None:
    assert blocks_per_sequence(None, 9, 4, 100) == 3
    assert blocks_per_sequence(100, 9, 4, 1) == 3


def test_windows_of_layers() -> None:
    assert windows_of_layers([4, None, 4, 2]) == ([None, 2, 4], [2, 0, 2, 1])
    assert windows_of_layers([8, 8]) == ([8], [0, 0])


def test_split_blocks_fills_all_groups_at_the_same_number_of_sequences() -> None:
    groups = split_blocks(10_000, [None, 8], [10, 30], block_size=4, max_model_len=64, max_chunk=8)
    needs = [blocks_per_sequence(window, 64, 4, 8) for window in (None, 8)]
    sequences = [group.num_blocks / need for group, need in zip(groups, needs)]
    assert abs(sequences[0] - sequences[1]) < 1
    used = sum(group.num_blocks * size for group, size in zip(groups, (10, 30)))
    assert 0 <= 10_000 - used < 40
