"""Slots: the running sequences as a struct of arrays, one line per slot."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from batchwright.request import Int32Array, Task
from batchwright.sequence import NO_SLOT, Sequence

NEVER = np.iinfo(np.int32).max


class Slots:
    """State the scheduler needs of every running sequence, vectorised over slots.

    Attributes (all [max_num_seqs] unless stated):
        sequences: the occupant, or None.
        epoch: counts occupations, so that late results find out that their sequence has left.
        order: the occupant's order.
        num_tokens: tokens that exist, including sampled ones not reported yet.
        num_known: tokens whose ids are known here.
        num_computed: tokens whose KV is scheduled.
        compute_end: where computing stops.
        max_len: number of tokens at which the sequence ends.
        expected_len: number of tokens at which it probably ends.
        num_prompt: prompt length.
        sampled_from: positions from here on were sampled by the executor during this occupation.
        write_from: tokens before it lie in shared blocks and are never written.
        score_from: first position whose token is scored, or NEVER.
        computed_once: see Sequence.num_computed_once.
        position_shift: position minus index of output tokens, 0 without a layout.
        prompt_positions: by slot, the positions of the prompt's tokens, of those with a layout.
        samples, watched, constrained, pools: bool, see Sequence; pools: hidden states are pooled.
        token_ids: [max_num_seqs, max_model_len]; rows take memory as they are written.
        end_token_ids: [max_num_seqs, width], -1 where unused.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        def zeros() -> Int32Array:
            return np.zeros(max_num_seqs, np.int32)

        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        self.epoch = zeros()
        self.order = np.zeros(max_num_seqs, np.int64)
        self.num_tokens, self.num_known, self.num_computed = zeros(), zeros(), zeros()
        self.compute_end, self.max_len, self.num_prompt = zeros(), zeros(), zeros()
        self.sampled_from, self.write_from, self.score_from = zeros(), zeros(), zeros()
        self.computed_once, self.expected_len, self.position_shift = zeros(), zeros(), zeros()
        self.prompt_positions: dict[int, Int32Array] = {}
        self.samples = np.zeros(max_num_seqs, np.bool_)
        self.watched = np.zeros(max_num_seqs, np.bool_)
        self.constrained = np.zeros(max_num_seqs, np.bool_)
        self.pools = np.zeros(max_num_seqs, np.bool_)
        self.token_ids = np.empty((max_num_seqs, max_model_len), np.int32)
        self.end_token_ids = np.full((max_num_seqs, 4), -1, np.int32)
        self._end_ids: list[tuple[int, ...]] = [()] * max_num_seqs  # what end_token_ids holds
        self._by_order: list[tuple[int, int]] = []  # (order, slot) of the occupied ones, sorted
        self._running: Int32Array | None = None  # the same slots as an array, made when asked for
        self._free = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots without an occupant."""
        return len(self._free)

    @property
    def num_running(self) -> int:
        """Occupied slots."""
        return len(self._by_order)

    @property
    def running(self) -> Int32Array:
        """Occupied slots, by order."""
        if self._running is None:
            slots = (slot for _, slot in self._by_order)
            self._running = np.fromiter(slots, np.int32, len(self._by_order))
        return self._running

    def occupy(self, sequence: Sequence, num_computed: int, write_from: int) -> int:
        """Give a sequence a free slot; returns it."""
        slot = self._free.pop()
        sequence.slot = slot
        self.sequences[slot] = sequence
        num_tokens, score_start = len(sequence.token_ids), sequence.score_start
        samples = sequence.samples
        self.order[slot] = sequence.order
        self.num_tokens[slot] = self.num_known[slot] = self.sampled_from[slot] = num_tokens
        self.num_computed[slot], self.write_from[slot] = num_computed, write_from
        self.compute_end[slot], self.max_len[slot] = sequence.compute_end, sequence.max_len
        self.num_prompt[slot] = sequence.num_prompt_tokens
        self.expected_len[slot] = sequence.expected_len
        self.score_from[slot] = score_start or NEVER
        self.computed_once[slot] = sequence.num_computed_once
        self.samples[slot], self.watched[slot] = samples, sequence.is_watched
        self.constrained[slot] = sequence.is_constrained
        self.pools[slot] = sequence.request.task is Task.EMBED and sequence.segment is None
        if (layout := sequence.request.layout) is not None:
            self.position_shift[slot] = layout.shift
            self.prompt_positions[slot] = layout.positions()
        self.token_ids[slot, :num_tokens] = sequence.token_ids
        self._set_end_tokens(slot, sequence.end_token_ids)
        insort(self._by_order, (sequence.order, slot))
        self._running = None
        return slot

    def vacate(self, slot: int) -> Sequence:
        """Free a slot; the sequence takes its known tokens along."""
        sequence = self.sequences[slot]
        assert sequence is not None
        sequence.token_ids = self.token_ids[slot, : self.num_known[slot]].copy()
        sequence.num_in_flight = int(self.num_tokens[slot] - self.num_known[slot])
        sequence.expected_len = int(self.expected_len[slot])
        sequence.num_computed_once = int(max(self.num_computed[slot], self.computed_once[slot]))
        sequence.slot = NO_SLOT
        self.sequences[slot] = None
        self.epoch[slot] += 1
        if self.prompt_positions.pop(slot, None) is not None:
            self.position_shift[slot] = 0
        del self._by_order[bisect_left(self._by_order, (sequence.order, slot))]
        self._running = None
        self._free.append(slot)
        return sequence

    def _set_end_tokens(self, slot: int, ids: tuple[int, ...]) -> None:
        if self._end_ids[slot] == ids:  # the last occupant's; nearly all rows have the model's
            return
        self._end_ids[slot] = ids
        missing = len(ids) - self.end_token_ids.shape[1]
        if missing > 0:
            self.end_token_ids = np.pad(
                self.end_token_ids, ((0, 0), (0, missing)), constant_values=-1
            )
        self.end_token_ids[slot] = -1
        self.end_token_ids[slot, : len(ids)] = ids
