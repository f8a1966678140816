"""Books: all that is known about sequences, in one place, so that it can be made anew at once.

What starts is decided in `admission.py`, what running sequences compute in `progress.py`. Both
write here; whatever they do, every block reference is held by a slot or by the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from batchwright.kv.block_table import BlockTable
from batchwright.kv.groups import KVGroup
from batchwright.kv.host_memory import HostMemory
from batchwright.kv.prefix_cache import PrefixCache
from batchwright.kv.segments import SegmentCache
from batchwright.plan.expected_lengths import ExpectedLengths
from batchwright.plan.job_tree import Int64Array
from batchwright.plan.order import OrderFunction
from batchwright.plan.orders.fcfs import fcfs
from batchwright.plan.plan import Plan
from batchwright.plan.prefix_tree import PrefixTree
from batchwright.request import Int32Array
from batchwright.sched.parking import Parking
from batchwright.sched.slots import Slots
from batchwright.sched.step_builder import StepBuilder
from batchwright.sched.waiting import Waiting
from batchwright.sequence import Sequence


class Books:
    """Empty at first. Arguments as those of Scheduler.

    Attributes:
        slots: sequences that run.
        waiting: sequences that do not.
        tables: the blocks of running sequences, one table per KV group.
        tree: the prompts of all sequences that are known.
        cache: which of their blocks are resident.
        expected: how long sequences will be.
        segments: segments that prompts with a layout import.
        host: blocks that the host keeps.
        parking: what it keeps of preempted sequences.
        builder: collects what the next Step computes and what has changed since the last.
    """

    def __init__(
        self,
        groups: Seq[KVGroup],
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        order: OrderFunction = fcfs,
        expected: ExpectedLengths,
    ) -> None:
        self.expected = expected
        expected.running = self
        self.block_size = block_size
        self.slots = Slots(max_num_seqs, max_model_len)
        kv_tokens = max(group.num_blocks for group in groups) * block_size
        plan = Plan(
            order,
            block_size=block_size,
            kv_tokens=kv_tokens,
            num_slots=max_num_seqs,
            expected=expected,
        )
        self.waiting = Waiting(plan)
        self.tables = [
            BlockTable(
                group,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
            )
            for group in groups
        ]
        self.tree = PrefixTree(block_size)
        self.host = HostMemory(groups[0].num_host_blocks, groups[0].num_blocks)
        assert not self.host or (len(groups) == 1 and groups[0].window is None)
        self.cache = PrefixCache(self.tree, self.tables, self.waiting.next_use, self.host)
        self.parking = Parking(self.slots, self.tables[0], self.cache, self.host)
        self.segments = SegmentCache(self.tables[0])
        self.builder = StepBuilder(self.slots, self.tables, self.host)

    def estimate_lengths(self, *others: Sequence) -> None:
        """Ask anew how long sequences will be: all that wait if more is known now, else those that
        nobody was asked about yet."""
        waiting = [*others, *self.waiting.all()]
        if not self.expected.is_due:
            waiting = [sequence for sequence in waiting if sequence.expected_output is None]
        self.expected.estimate(waiting)

    def so_far(self) -> tuple[list[Sequence], Int64Array]:
        """Sequences that run, with what is expected of them, and their output tokens."""
        slots, running = self.slots, self.slots.running
        sequences = [self.occupant(slot) for slot in running.tolist()]
        for sequence, length in zip(sequences, slots.expected_len[running].tolist(), strict=True):
            sequence.expected_len = length
        return sequences, (slots.num_known[running] - slots.num_prompt[running]).astype(np.int64)

    def take_expected(self, sequences: Seq[Sequence]) -> None:
        """Other lengths are expected of these, which run."""
        slots = [sequence.slot for sequence in sequences]
        self.slots.expected_len[slots] = [sequence.expected_len for sequence in sequences]

    def occupant(self, slot: int) -> Sequence:
        """The sequence that runs in a slot."""
        sequence = self.slots.sequences[slot]
        assert sequence is not None
        return sequence

    def no_longer_waits(self, sequence: Sequence) -> None:
        """One user less of a prompt's blocks; those without any leave the cache."""
        if (layout := sequence.request.layout) is not None and sequence.segment is None:
            self.segments.no_longer_wait(layout)
        unwanted = self.tree.start(sequence.nodes)
        if len(unwanted):
            self.cache.drop(unwanted)

    def leave(self, *slots: int) -> None:
        """Vacate slots, at least one, and drop their blocks."""
        for slot in slots:
            self.slots.vacate(slot)
            self.builder.release(slot)
        for table in self.tables:
            table.release(*slots)

    def keep_prefix(self, slot: int, start: int, end: int) -> None:
        """Tokens [start, end) of a slot are scheduled: share the prompt blocks they complete."""
        sequence = self.occupant(slot)
        if sequence.segment is not None:
            if end == sequence.compute_end:
                self.segments.keep(sequence.segment, slot)
            return
        nodes = sequence.nodes
        first, last = start // self.block_size, min(end // self.block_size, len(nodes))
        if first < last:
            self.cache.insert(slot, nodes, first, last)

    def move_to_waiting(self, slot: int, *, keep_prefix: bool) -> Sequence:
        """A running sequence loses its slot and waits again; returns it. An encoder of a segment
        does not wait: rows that need the segment start another.

        Args:
            keep_prefix: its prompt blocks stay resident as long as memory allows.
        """
        sequence = self.occupant(slot)
        layout = sequence.request.layout
        if sequence.segment is None and layout is not None:
            self.segments.wait(layout)
        self.tree.wait_again(sequence.nodes)
        if keep_prefix:
            self.keep_prefix(slot, 0, int(self.slots.num_computed[slot]))
        self.leave(slot)
        if sequence.segment is not None:
            self.segments.abandon(sequence.segment)
            return sequence
        self.waiting.put_back(sequence)
        return sequence

    def adopt_prefix(self, slot: int, nodes: Int32Array, limit: int) -> None:
        """Let an empty slot hold the blocks of a matched prefix, for whose blocks on the host there
        is room; see `PrefixCache.adopt`."""

        def make_room(num_blocks: int) -> None:
            lack = num_blocks - self.tables[0].pool.num_free
            if lack > 0:
                self.evict(0, lack)

        self.cache.adopt(slot, nodes, limit, make_room)

    def forget_kept(self) -> None:
        """Nothing that was computed can be trusted: share none of it, and keep none on the host."""
        self.cache.clear()
        self.segments.clear()
        self.parking.clear()
        self.host.clear()

    def num_evictable(self, group: int) -> int:
        """Blocks of a group that `evict` can free."""
        of_segments = self.segments.num_evictable() if self.segments else 0
        return self.cache.num_evictable(group) + of_segments

    def evict(self, group: int, num_blocks: int) -> None:
        """Free blocks that no running sequence holds, up to so many or a little more.

        Segments that nobody waits for go first, then prefixes, then segments.
        """
        if self.segments:
            num_blocks -= self.segments.evict(num_blocks, unneeded_only=True)
        if num_blocks > 0:
            free_before = self.tables[group].pool.num_free
            self.cache.evict(group, num_blocks)
            num_blocks -= self.tables[group].pool.num_free - free_before
        if num_blocks > 0 and self.segments:
            self.segments.evict(num_blocks)

    def check_integrity(self) -> None:
        """Conservation law: every block reference is held by a slot or by the prefix cache, every
        block of the host by this or by the parking."""
        for group, table in enumerate(self.tables):
            held = [table.held(), self.cache.held(group)]
            if group == 0:
                held.append(self.segments.held())
            table.pool.check_integrity(np.concatenate(held))
        self.host.check_integrity(np.concatenate((self.cache.held_on_host(), self.parking.held())))
