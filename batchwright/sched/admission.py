"""Admission: which waiting sequences start in a Step, and on top of which resident blocks.

No two of them compute the same prefix: there is budget for another only while every sequence that
runs has all its prompt scheduled, and what is scheduled is shared.

It cannot deadlock: when nothing runs, everything but the newcomer's own blocks can be evicted.
"""

from __future__ import annotations

import numpy as np

from batchwright.kv.block_table import BlockTable
from batchwright.kv.groups import blocks_per_sequence
from batchwright.sched.books import Books
from batchwright.sched.limits import StepLimits
from batchwright.sched.progress import Progress
from batchwright.sequence import Sequence


class Admission:
    """Starts waiting sequences while budget, slots and blocks last."""

    def __init__(self, books: Books, limits: StepLimits, progress: Progress) -> None:
        self._books = books
        self._limits = limits
        self._progress = progress
        self._simple: list[tuple[int, int]] = []  # (slot, tokens) that start, see _is_simple
        self._num_promised_blocks = 0  # what these will take in each group

    def admit(self, budget: int) -> None:
        """Start sequences that compute at most `budget` tokens together."""
        books = self._books
        while budget > 0 and self._progress.num_free_slots:
            sequence = books.waiting.next()
            if sequence is None:
                break
            if self._is_simple(sequence):
                budget -= self._start_simple(sequence, budget)
                continue
            self._advance_simple()
            num_matched = self._num_matched(sequence)
            if self._short_group(sequence, num_matched) is not None:
                books.waiting.put_back(sequence)
                break
            budget -= self._start(sequence, num_matched, budget)
        self._advance_simple()

    def stays_closed(self, budget: int, *, may_ask_plan: bool) -> bool:
        """Whether nothing can start in a Step of this budget, and none while running rows grow.

        Rows that grow take free blocks, or such as only the cache holds, so a group without a
        window that lacks room for a sequence goes on lacking it.

        Args:
            may_ask_plan: whether the next Step's `admit` would ask the plan in the state it is in.
        """
        waiting = self._books.waiting
        if budget <= 0 or not self._progress.num_free_slots:
            return True
        if not may_ask_plan and not waiting.is_known:
            return False
        sequence = waiting.next()
        if sequence is None:
            return True
        waiting.put_back(sequence)
        if self._is_simple(sequence):
            return False
        short = self._short_group(sequence, self._num_matched(sequence))
        return short is not None and self._books.tables[short].window is None

    # Sequences that share nothing -------------------------------------------------------------

    def _is_simple(self, sequence: Sequence) -> bool:
        """Whether a sequence can start at once and shares nothing with anyone.

        Such sequences are what a job without common prefixes consists of. They are advanced
        together; that comes to the same as one by one, because none has anything to do with
        another, and costs a tenth.
        """
        if sequence.num_cached_tokens is not None or sequence.siblings:
            return False  # its blocks may be resident, or its siblings want to fork
        if not self._books.tree.is_alone(sequence.nodes):
            return False
        num_running = self._books.slots.num_running
        for table in self._books.tables:
            need = self._blocks_to_start(table, sequence) + num_running
            if need > table.pool.num_free - self._num_promised_blocks:
                return False
        return num_running > 0

    def _start_simple(self, sequence: Sequence, budget: int) -> int:
        """Give a slot to a simple sequence; returns the tokens that it will compute."""
        books = self._books
        slot = books.slots.occupy(sequence, 0, write_from=0)
        num_tokens = min(len(sequence.token_ids), sequence.compute_end, budget)
        self._simple.append((slot, num_tokens))
        self._num_promised_blocks += -(-num_tokens // books.block_size)
        books.builder.add_new(slot)
        sequence.num_cached_tokens = 0
        return num_tokens

    def _advance_simple(self) -> None:
        """Schedule the simple sequences that have been given slots."""
        if not self._simple:
            return
        books = self._books
        slots, grants = np.array(self._simple, np.int32).T
        self._simple, self._num_promised_blocks = [], 0
        books.tree.start(np.concatenate([books.occupant(s).nodes for s in slots.tolist()]))
        self._progress.advance(slots, grants, shared=False)

    # Any other --------------------------------------------------------------------------------

    def _num_matched(self, sequence: Sequence) -> int:
        """Resident blocks that a sequence can start from."""
        nodes, limit = sequence.nodes, sequence.first_needed_position
        return self._books.cache.match(nodes, limit) if len(nodes) else 0

    def _short_group(self, sequence: Sequence, num_matched: int) -> int | None:
        """The first group that lacks room for all known tokens of a sequence, None: they fit.

        Every running slot is left one block of growth.
        """
        books = self._books
        num_running = books.slots.num_running
        if not num_running:
            return None
        nodes, limit = sequence.nodes[:num_matched], sequence.first_needed_position
        for group, table in enumerate(books.tables):
            need = self._blocks_to_start(table, sequence)
            shared, cache_only = books.cache.num_adopted(group, nodes, limit)
            missing = need - shared + num_running - table.pool.num_free
            if missing > 0 and missing > books.cache.num_evictable(group) - cache_only:
                return group
        return None

    def _blocks_to_start(self, table: BlockTable, sequence: Sequence) -> int:
        """Blocks that all known tokens of a sequence and its next one take in a group."""
        num_tokens = len(sequence.token_ids) + 1
        return blocks_per_sequence(
            table.window, num_tokens, self._books.block_size, self._limits.max_tokens
        )

    def _start(self, sequence: Sequence, num_matched: int, budget: int) -> int:
        """Admit a sequence on top of its matched prefix; returns the tokens scheduled."""
        books, progress = self._books, self._progress
        limit = sequence.first_needed_position
        covered = num_matched * books.block_size
        slot = books.slots.occupy(sequence, min(covered, limit), write_from=covered)
        if num_matched:
            books.cache.adopt(slot, sequence.nodes[:num_matched], limit)
        progress.book_start(sequence, num_cached=int(books.slots.num_computed[slot]))
        books.builder.add_new(slot)
        wanted = min(len(sequence.token_ids), sequence.compute_end) - books.slots.num_computed[slot]
        slots, grants = np.array([slot], np.int32), np.array([min(wanted, budget)], np.int32)
        if not progress.make_room(slots, grants):  # siblings' copies may have taken the rest
            grants = grants[:0]
            slots = slots[:0]
        progress.advance(slots, grants)
        return int(grants.sum())
