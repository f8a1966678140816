"""Admission: which waiting sequences start in a Step, and on top of which resident blocks.

No two of them compute the same prefix: there is budget for another only while every sequence that
runs has all its prompt scheduled, and what is scheduled is shared.

It cannot deadlock: when nothing runs, everything but the newcomer's own blocks can be evicted.

A sequence whose prompt has a layout needs the segments it imports. Where one is absent an encoder
is started for it, a sequence that draws nothing, and the next sequence is looked at.
"""

from __future__ import annotations

import numpy as np

from batchwright.kv.block_table import BlockTable
from batchwright.kv.groups import blocks_per_sequence
from batchwright.kv.segments import segment_blocks
from batchwright.prompt_layout import PromptLayout, Segment
from batchwright.request import Request
from batchwright.sched.books import Books
from batchwright.sched.limits import StepLimits
from batchwright.sched.progress import Progress
from batchwright.sequence import Sequence

MAX_HELD = 64
"""Sequences looked at in one Step whose segments are not there yet."""


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
        books, held = self._books, list[Sequence]()
        while budget > 0 and self._progress.num_free_slots and len(held) < MAX_HELD:
            sequence = books.waiting.next()
            if sequence is None:
                break
            if self._is_simple(sequence):
                budget -= self._start_simple(sequence, budget)
                continue
            self._advance_simple()
            num_matched = self._num_matched(sequence)
            if missing := self._missing_segments(sequence, num_matched):
                budget -= self._encode(sequence, missing, budget)
                held.append(sequence)
                continue
            if self._short_group(sequence, num_matched) is not None:
                books.waiting.put_back(sequence)
                break
            budget -= self._start(sequence, num_matched, budget)
        self._advance_simple()
        for sequence in held:
            books.waiting.put_back(sequence)

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
        if sequence.request.layout is not None or self._is_simple(sequence):
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
        if sequence.request.layout is not None:
            return False  # it takes its segments over
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
            if missing > 0 and missing > books.num_evictable(group) - cache_only:
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
        covered, layout = num_matched * books.block_size, sequence.request.layout
        first = min(covered, limit)
        if layout is not None:
            first = max(first, layout.num_imported)
        slot = books.slots.occupy(sequence, first, write_from=covered)
        if num_matched:
            books.cache.adopt(slot, sequence.nodes[:num_matched], limit)
        progress.book_start(sequence, num_cached=int(books.slots.num_computed[slot]))
        books.builder.add_new(slot)
        wanted = min(len(sequence.token_ids), sequence.compute_end) - books.slots.num_computed[slot]
        slots, grants = np.array([slot], np.int32), np.array([min(wanted, budget)], np.int32)
        if not progress.make_room(slots, grants):  # siblings' copies may have taken the rest
            if layout is not None:  # its blocks must be there when it takes its segments over
                books.move_to_waiting(slot, keep_prefix=False)
                return budget
            grants = grants[:0]
            slots = slots[:0]
        progress.advance(slots, grants)
        if layout is not None and covered < layout.num_imported:
            self._import(slot, layout, covered)
        return int(grants.sum())

    # Prompts with a layout ----------------------------------------------------------------------

    def _missing_segments(self, sequence: Sequence, num_matched: int) -> list[Segment]:
        """Segments that must be encoded before a sequence can start on its matched prefix."""
        layout = sequence.request.layout
        if layout is None or num_matched * self._books.block_size >= layout.num_imported:
            return []
        return self._books.segments.want(layout)

    def _encode(self, sequence: Sequence, missing: list[Segment], budget: int) -> int:
        """Start encoders of segments, as budget, slots and blocks allow; returns the tokens.

        An encoder takes all its blocks at once, so none can stop half-way for want of them.
        """
        books, (table,), spent = self._books, self._books.tables, 0
        for segment in missing:
            if books.segments.is_encoding(segment):
                continue
            if spent == budget or not self._progress.num_free_slots:
                break
            need, num_running = segment_blocks([segment], books.block_size), books.slots.num_running
            lack = need - table.pool.num_free
            if num_running and lack + num_running > books.num_evictable(0):
                break
            if lack > 0:
                books.evict(0, lack)
            if need > table.pool.num_free:
                break
            spent += self._start_encoder(sequence, segment, budget - spent)
        return spent

    def _start_encoder(self, sequence: Sequence, segment: Segment, budget: int) -> int:
        books = self._books
        encoder = encoder_of(segment, sequence)
        slot = books.slots.occupy(encoder, 0, write_from=0)
        books.builder.add_new(slot)
        books.segments.begin_encoding(segment)
        slots, zero = np.array([slot], np.int32), np.zeros(1, np.int32)
        books.tables[0].grow(slots, zero, np.array([segment.num_tokens], np.int32))
        grant = min(segment.num_tokens, budget)
        self._progress.advance(slots, np.array([grant], np.int32))
        return grant

    def _import(self, slot: int, layout: PromptLayout, covered: int) -> None:
        """Copy the KV of imported tokens, from `covered` on, into the slot's own blocks."""
        books = self._books
        tokens = np.arange(covered, layout.num_imported, dtype=np.int32)
        destinations = books.tables[0].kv_slots(np.full(len(tokens), slot, np.int32), tokens)
        books.builder.add_kv_copies(books.segments.kv_slots(layout, covered), destinations)
        books.keep_prefix(slot, covered, layout.num_imported)


def encoder_of(segment: Segment, row: Sequence) -> Sequence:
    """The sequence that encodes a segment, in the name of a row that needs it."""
    request = Request(
        id=row.request.id,
        prompt_token_ids=segment.token_ids,
        layout=PromptLayout((), segment.runs),
        urgent=row.request.urgent,
    )
    return Sequence(
        request=request,
        order=row.order,
        sample_index=0,
        end_token_ids=(),
        noise_key=0,
        max_len=segment.num_tokens,
        token_ids=request.prompt_token_ids,
        segment=segment,
    )
