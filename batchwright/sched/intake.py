"""Intake: what a Step's result means for the sequences it was made for.

A result may come one Step late. By then a slot may have another occupant; slots are therefore
compared by epoch. A sequence that was preempted meanwhile still gets its token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.request import FinishReason, Int32Array
from batchwright.sched.slots import Slots
from batchwright.sched.step_builder import InFlight
from batchwright.sched.work import Work
from batchwright.sequence import Sequence


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start; tokens unless named otherwise."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens taken from shared blocks
    num_generated_tokens: int = 0
    num_preemptions: int = 0  # events
    num_swapped_blocks: int = 0  # blocks of keys and values copied to the host and from it
    num_folded: int = 0  # rows answered by the computation of an identical one
    work: Work = field(default_factory=Work)

    @property
    def num_recomputed_tokens(self) -> int:
        """Computed again after preemption or a failed step; part of the computed ones."""
        return self.work.num_recomputed_tokens


class Ending(NamedTuple):
    """How a sequence ends; `stop_reason` as in Sequence."""

    sequence: Sequence
    reason: FinishReason
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Update:
    """What a StepResult changed.

    Attributes:
        finished: sequences that ended, their tokens in `token_ids`.
        watched: (sequence, line of the result) of tokens drawn for watched sequences.
        scored: (sequence, first scored position, first line, end line) in the score results.
        pooled: (sequence, slot) whose embedding is in the result.
    """

    finished: list[Sequence] = field(default_factory=list)
    watched: list[tuple[Sequence, int]] = field(default_factory=list)
    scored: list[tuple[Sequence, int, int, int]] = field(default_factory=list)
    pooled: list[tuple[Sequence, int]] = field(default_factory=list)


class Intake:
    """Writes results into the slots and ends the sequences they end.

    Args:
        slots: the running sequences.
        stats: counts generated tokens.
        finish: the scheduler's; ends many sequences at once.
    """

    def __init__(
        self, slots: Slots, stats: SchedulerStats, finish: Callable[[list[Ending]], None]
    ) -> None:
        self._slots = slots
        self._stats = stats
        self._finish = finish
        # Preempted with a token in flight, by the (slot, epoch) they left.
        self._late: dict[tuple[int, int], Sequence] = {}

    def expect_late(self, slot: int, epoch: int, sequence: Sequence) -> None:
        """A sequence left its slot with a token in flight."""
        self._late[slot, epoch] = sequence

    def forget_late(self) -> None:
        """No more late tokens will come."""
        self._late.clear()

    def take(self, record: InFlight, token_ids: Int32Array) -> Update:
        """Take in the result of the Step that `record` remembers."""
        update = Update()
        self._take_scores(record, update)
        self._take_pooled(record, update)
        self._take_tokens(record, token_ids, update)
        return update

    def _take_tokens(self, record: InFlight, token_ids: Int32Array, update: Update) -> None:
        state = self._slots
        live = state.epoch[record.sample_slots] == record.sample_epochs
        for line in np.flatnonzero(~live).tolist():
            key = int(record.sample_slots[line]), int(record.sample_epochs[line])
            left = self._late.pop(key, None)
            if left is not None and left.finish_reason is None:
                self._take_late(left, line, int(token_ids[line]), update)
        lines = np.flatnonzero(live)
        self._take_live(record.sample_slots[lines], token_ids[lines], lines, update)

    def take_equal(
        self, slots: Int32Array, ordinary_ids: Int32Array, token_ids: Int32Array, num_steps: int
    ) -> Update:
        """Take in what these slots, none of them watched, drew in `num_steps` Steps.

        Args:
            ordinary_ids, token_ids: see `EqualResults`.
        """
        update, state, num_before = Update(), self._slots, num_steps - 1
        if num_before:
            known = state.num_known[slots]
            positions = known[:, None] + np.arange(num_before, dtype=np.int32)
            state.token_ids[slots[:, None], positions] = ordinary_ids[:, None]
            state.num_known[slots] = known + np.int32(num_before)
            self._stats.num_generated_tokens += num_before * len(slots)
        self._take_live(slots, token_ids, np.arange(len(slots)), update)
        return update

    def _take_live(
        self, slots: Int32Array, ids: Int32Array, lines: npt.NDArray[np.int64], update: Update
    ) -> None:
        """Tokens of sequences that are in their slots; `lines` says where in the result."""
        state = self._slots
        state.token_ids[slots, state.num_known[slots]] = ids
        state.num_known[slots] += 1
        self._stats.num_generated_tokens += len(lines)
        for index in np.flatnonzero(state.watched[slots]).tolist():
            sequence = state.sequences[slots[index]]
            assert sequence is not None
            update.watched.append((sequence, int(lines[index])))
        ended = (state.end_token_ids[slots] == ids[:, None]).any(axis=1)
        full = state.num_known[slots] == state.max_len[slots]
        endings = []
        for index in np.flatnonzero(ended | full | (ids < 0)).tolist():
            sequence = state.sequences[slots[index]]
            assert sequence is not None
            endings.append(ending_by_token(sequence, int(ids[index]), bool(ended[index])))
        self._end(endings, update)

    def _take_late(self, sequence: Sequence, line: int, token_id: int, update: Update) -> None:
        """A token for a sequence that was preempted meanwhile."""
        sequence.token_ids = np.append(sequence.token_ids, np.int32(token_id))
        sequence.num_in_flight = 0
        self._stats.num_generated_tokens += 1
        if sequence.is_watched:
            update.watched.append((sequence, line))
        ended = token_id in sequence.end_token_ids
        if ended or token_id < 0 or len(sequence.token_ids) == sequence.max_len:
            self._end([ending_by_token(sequence, token_id, ended)], update)

    def _end(self, endings: list[Ending], update: Update) -> None:
        if endings:
            self._finish(endings)
            update.finished += [e.sequence for e in endings if e.sequence.segment is None]

    def _take_scores(self, record: InFlight, update: Update) -> None:
        for slot, epoch, position, first, end in record.scores:
            is_live = self._slots.epoch[slot] == epoch
            # A preempted sequence may end with its late token and never be scored again.
            sequence = self._slots.sequences[slot] if is_live else self._late.get((slot, epoch))
            if sequence is not None and sequence.finish_reason is None:
                update.scored.append((sequence, position, first, end))

    def _take_pooled(self, record: InFlight, update: Update) -> None:
        """Sequences that draw nothing end with the Step that computes their last token."""
        endings = []
        for slot, epoch in record.completed:
            sequence = self._slots.sequences[slot]
            if sequence is None or self._slots.epoch[slot] != epoch:
                continue
            if self._slots.pools[slot]:
                update.pooled.append((sequence, slot))
            endings.append(Ending(sequence, FinishReason.STOP))
        self._end(endings, update)


def ending_by_token(sequence: Sequence, token_id: int, ended: bool) -> Ending:
    """How a sequence ends with a token that ends it (`ended`), is none, or is its last."""
    if token_id < 0:
        return Ending(sequence, FinishReason.ERROR)
    if ended:
        return Ending(sequence, FinishReason.STOP, token_id)
    return Ending(sequence, FinishReason.LENGTH)
