"""Admission: which waiting sequences start in a Step, and on top of which resident blocks.

No two of them compute the same prefix: there is budget for another only while every sequence that
runs has all its prompt scheduled, and what is scheduled is shared.

A sequence starts if what runs and itself fit to their expected ends (`forecast.py`), not only now;
so as long as lengths are as expected nothing is preempted.

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
from batchwright.request import Int32Array, Request
from batchwright.sched.books import Books
from batchwright.sched.forecast import Forecast
from batchwright.sched.limits import StepLimits
from batchwright.sched.progress import Progress
from batchwright.sequence import Sequence

NO_BLOCKS: Int32Array = np.empty(0, np.int32)

MAX_HELD = 64
"""Sequences looked at in one Step whose segments are not there yet."""


class Admission:
    """Starts waiting sequences while budget, slots and blocks last."""

    def __init__(
        self, books: Books, limits: StepLimits, progress: Progress, forecast: Forecast
    ) -> None:
        self._books = books
        self._forecast = forecast
        self._limits = limits
        self._progress = progress
        self._simple: list[tuple[int, int]] = []  # (slot, tokens) that start, see _is_simple
        self._num_promised_blocks = 0  # what these will take in each group

    @property
    def num_free_slots(self) -> int:
        """Sequences that may still be started."""
        return self._progress.num_free_slots

    def admit(self, budget: int) -> None:
        """Start sequences that compute at most `budget` tokens together."""
        books, held = self._books, list[Sequence]()
        if budget > 0 and self._wants_lengths and books.expected.is_due:
            books.estimate_lengths()
        while budget > 0 and self._progress.num_free_slots and len(held) < MAX_HELD:
            sequence = books.waiting.next(books.slots.num_running)
            if sequence is None:
                break
            if sequence.expected_output is None and self._wants_lengths:
                books.estimate_lengths(sequence)
            if self._is_simple(sequence, budget):
                budget -= self._start_simple(sequence, budget)
                continue
            self._advance_simple()
            num_matched = self.num_matched(sequence)
            if missing := self._missing_segments(sequence, num_matched):
                budget -= self._encode(sequence, missing, budget)
                held.append(sequence)
                continue
            if not self._has_room(sequence, num_matched, budget):
                held.append(sequence)
                if books.waiting.refuse(sequence):
                    continue
                break
            budget -= self._start(sequence, num_matched, budget)
        self._advance_simple()
        for sequence in held:
            books.waiting.put_back(sequence)

    @property
    def _wants_lengths(self) -> bool:
        """Whether memory is short, and ended sequences tell how long others may be."""
        return self._forecast.was_needed and self._books.expected.knows_any

    # Sequences that share nothing -------------------------------------------------------------

    def _is_simple(self, sequence: Sequence, budget: int) -> bool:
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
        if not self._books.slots.num_running:
            return False
        for table in self._books.tables:
            need = self._blocks_to_start(table, sequence)
            if need > table.pool.num_free - self._num_promised_blocks:
                return False
        if self._forecast.surely_fits(sequence):
            return True
        self._advance_simple()  # the forecast is made of what is scheduled
        num_computed = min(len(sequence.token_ids), sequence.compute_end, budget)
        nothing = [NO_BLOCKS] * len(self._books.tables)
        return self._forecast.reserve(sequence, num_computed, nothing, 0)

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

    def num_matched(self, sequence: Sequence) -> int:
        """Resident blocks that a sequence can start from."""
        nodes, limit = sequence.nodes, sequence.first_needed_position
        return self._books.cache.match(nodes, limit) if len(nodes) else 0

    def shared_blocks(self, sequence: Sequence, num_matched: int) -> list[Int32Array]:
        """Blocks of its matched prefix that a sequence takes over in each group."""
        nodes, limit = sequence.nodes[:num_matched], sequence.first_needed_position
        groups = range(len(self._books.tables))
        return [self._books.cache.adopted(group, nodes, limit) for group in groups]

    def num_taken_over(self, sequence: Sequence, num_matched: int) -> int:
        """Blocks of its matched prefix, and of those before a window, that a sequence need not be
        given: what comes back from the host takes others."""
        return num_matched - self._books.cache.num_on_host(sequence.nodes[:num_matched])

    def num_lacking(self, sequence: Sequence, group: int, num_shared: int) -> int:
        """Blocks beyond free ones that the known tokens of a sequence and its next one take."""
        table = self._books.tables[group]
        return self._blocks_to_start(table, sequence) - num_shared - table.pool.num_free

    def num_to_evict(self, group: int, shared: Int32Array) -> int:
        """Blocks of a group that can be freed, unless a sequence takes over `shared`."""
        books = self._books
        cache_only = np.count_nonzero(books.tables[group].pool.ref_counts[shared] == 1)
        return books.num_evictable(group) - int(cache_only)

    def num_computed_at_once(self, sequence: Sequence, num_matched: int, budget: int) -> int:
        """Tokens of a sequence whose KV is there or scheduled once it has started."""
        computed = self._first_to_compute(sequence, num_matched)
        wanted = min(len(sequence.token_ids), sequence.compute_end) - computed
        return computed + min(wanted, budget)

    def _first_to_compute(self, sequence: Sequence, num_matched: int) -> int:
        """Where a sequence goes on from its matched prefix and what it imports, or from where it
        was preempted."""
        covered = num_matched * self._books.block_size
        covered = max(covered, self._books.parking.num_computed(sequence, num_matched))
        first = min(covered, sequence.first_needed_position)
        layout = sequence.request.layout
        return first if layout is None else max(first, layout.num_imported)

    def _has_room(self, sequence: Sequence, num_matched: int, budget: int) -> bool:
        """Whether all known tokens fit now, and all of the sequence until its expected end.

        If so the forecast counts it as started.
        """
        books = self._books
        if not books.slots.num_running:
            return True
        shared = self.shared_blocks(sequence, num_matched)
        for group in range(len(books.tables)):
            lacking = self.num_lacking(sequence, group, len(shared[group]))
            if lacking > 0 and lacking > self.num_to_evict(group, shared[group]):
                return False
        if self._forecast.surely_fits(sequence):
            return True
        computed = self.num_computed_at_once(sequence, num_matched, budget)
        num_held = self.num_taken_over(sequence, num_matched)
        fits = self._forecast.reserve(sequence, computed, shared, num_held)
        return fits or sequence.request.urgent  # somebody waits for it; others may make room later

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
        first = self._first_to_compute(sequence, num_matched)
        slot = books.slots.occupy(sequence, first, write_from=covered)
        if num_matched:
            books.adopt_prefix(slot, sequence.nodes[:num_matched], limit)
        progress.book_start(sequence, num_cached=int(books.slots.num_computed[slot]))
        books.builder.add_new(slot)
        was_parked = books.parking.num_computed(sequence, num_matched) > covered
        wanted = min(len(sequence.token_ids), sequence.compute_end) - books.slots.num_computed[slot]
        slots, grants = np.array([slot], np.int32), np.array([min(wanted, budget)], np.int32)
        if not progress.make_room(slots, grants):  # siblings' copies may have taken the rest
            if layout is not None or was_parked:  # blocks must be there for what it takes over
                books.move_to_waiting(slot, keep_prefix=was_parked)
                return budget
            grants = grants[:0]
            slots = slots[:0]
        progress.advance(slots, grants)
        if was_parked:
            books.parking.load(slot)
        else:
            books.parking.forget(sequence)
        if layout is not None and covered < layout.num_imported:
            self._import(slot, layout, covered)
        self._forecast.holds(slot)
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

        An encoder takes all its blocks at once, so none can stop half-way for want of them. The
        forecast is not asked: when it has ended what it holds can be given up.
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
