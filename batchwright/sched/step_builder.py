"""StepBuilder: turns the scheduler's decisions into the flat arrays of a Step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from batchwright.kv.block_table import BlockTable, ragged_ranges
from batchwright.kv.host_memory import HostMemory
from batchwright.request import Int32Array, Task
from batchwright.sched.slots import NEVER, Slots
from batchwright.sequence import Sequence
from batchwright.step import LAST_SAMPLED, NO_WRITE, NewSequence, Step


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InFlight:
    """What the scheduler must remember of a Step until its result comes.

    Slots are paired with their epoch at the time, since the occupant may have left meanwhile.

    Attributes:
        sample_slots, sample_epochs: [num_samples].
        scores: (slot, epoch, first scored position, first line, end line) per scored row.
        completed: (slot, epoch) of rows that draw nothing and are computed to their end.
    """

    step_id: int
    sample_slots: Int32Array
    sample_epochs: Int32Array
    scores: list[tuple[int, int, int, int, int]]
    completed: list[tuple[int, int]]


class StepBuilder:
    """Collects decisions; `build` empties it. What happens between Steps waits for the next."""

    def __init__(self, slots: Slots, tables: Seq[BlockTable], host: HostMemory) -> None:
        self._state = slots
        self._tables = tables
        self._host = host
        self._next_id = 0
        self._released: list[int] = []
        self._new: list[int] = []
        self._rows: list[tuple[Int32Array, Int32Array, Int32Array]] = []
        self._sampled: list[Int32Array] = []
        self._forks: list[tuple[int, int]] = []
        self._kv_copies: list[Int32Array] = []

    def release(self, slot: int) -> None:
        """A slot lost its occupant."""
        self._released.append(slot)
        if slot in self._new:  # it came and went between two Steps
            self._new.remove(slot)

    def add_new(self, slot: int) -> None:
        """A slot has a new occupant."""
        self._new.append(slot)

    def add_rows(self, slots: Int32Array, starts: Int32Array, ends: Int32Array) -> None:
        """Compute tokens [start, end) of each slot."""
        self._rows.append((slots, starts, ends))

    def add_samples(self, slots: Int32Array) -> None:
        """Draw a token for each slot from the logits of the last token it computes."""
        self._sampled.append(slots)

    def add_fork(self, child: int, parent: int) -> None:
        """Draw a token for `child`, a new occupant, from the logits of its parent."""
        self._new.append(child)
        self._forks.append((child, parent))

    def add_kv_copies(self, sources: Int32Array, destinations: Int32Array) -> None:
        """Copy single tokens' KV, by KV slot, before anything is computed."""
        self._kv_copies.append(np.stack((sources, destinations), axis=1))

    def build(self) -> tuple[Step, InFlight] | tuple[None, None]:
        """The Step of everything collected; (None, None) if nothing is to be computed."""
        if not self._rows:
            return None, None
        state = self._state
        slots, starts, ends = (np.concatenate(column) for column in zip(*self._rows, strict=True))
        rows, positions = ragged_ranges(
            np.arange(len(slots), dtype=np.int32), starts, ends - starts
        )
        token_slots = slots[rows]
        token_ids = np.where(
            positions >= state.sampled_from[token_slots],
            np.int32(LAST_SAMPLED),
            state.token_ids[token_slots, positions],
        )
        cu_seqlens_q = np.concatenate(([0], np.cumsum(ends - starts))).astype(np.int32)
        sample_tokens, sample_slots = self._samples(slots, cu_seqlens_q)
        score_tokens, score_targets = self._scores(token_slots, positions)
        changes = [table.take_changes() for table in self._tables]
        saved, loaded = self._host.take_changes() if self._host else (None, None)
        step = Step(
            step_id=self._next_id,
            finished_slots=self.released,
            new_sequences=tuple(self._new_sequence(slot) for slot in self._new),
            table_updates=tuple(update for update, _ in changes),
            block_copies=tuple(copies for _, copies in changes),
            saved_blocks=saved,
            loaded_blocks=loaded,
            kv_copies=np.concatenate(self._kv_copies) if self._kv_copies else None,
            slots=slots,
            cu_seqlens_q=cu_seqlens_q,
            token_ids=token_ids,
            positions=positions,
            position_ids=self._position_ids(slots, cu_seqlens_q, token_slots, positions),
            kv_slots=self._kv_slots(token_slots, positions),
            sample_tokens=sample_tokens,
            sample_slots=sample_slots,
            score_tokens=score_tokens,
            score_targets=score_targets,
            score_top=self._score_top(slots) if len(score_tokens) else 0,
            pool_rows=np.flatnonzero(state.pools[slots]).astype(np.int32),
            pool_done=(ends == state.compute_end[slots])[state.pools[slots]],
        )
        record = InFlight(
            step_id=self._next_id,
            sample_slots=sample_slots,
            sample_epochs=state.epoch[sample_slots],
            scores=self._score_records(rows, token_slots, positions, score_tokens),
            completed=self._completed(slots, ends),
        )
        self._next_id += 1
        self._released, self._new = [], []
        self._drop_rows()
        return step, record

    @property
    def released(self) -> Int32Array:
        """[n] slots that lost their occupants since the last Step."""
        return np.array(self._released, np.int32)

    def skip(self, num_steps: int) -> None:
        """So many Steps were not built; who skipped them knows what was released before."""
        self._next_id += num_steps
        self._released = []

    def reset(self) -> None:
        """No slot has an occupant any more, and nothing is to be computed."""
        self._released, self._new = list(range(len(self._state.sequences))), []
        self._drop_rows()
        for table in self._tables:
            table.take_changes()

    def _drop_rows(self) -> None:
        self._rows, self._sampled, self._forks, self._kv_copies = [], [], [], []

    def _position_ids(
        self,
        slots: Int32Array,
        cu_seqlens_q: Int32Array,
        token_slots: Int32Array,
        positions: Int32Array,
    ) -> Int32Array | None:
        """What the model is told, if any row of the Step has a layout."""
        state = self._state
        if not state.prompt_positions:
            return None
        ids = positions + state.position_shift[token_slots]
        in_prompt = positions[cu_seqlens_q[:-1]] < state.num_prompt[slots]
        for row in np.flatnonzero(in_prompt).tolist():
            given = state.prompt_positions.get(int(slots[row]))
            if given is not None:
                first, end = cu_seqlens_q[row], cu_seqlens_q[row + 1]
                given = given[positions[first] : positions[end - 1] + 1]
                ids[first : first + len(given)] = given
        return ids

    def _kv_slots(self, token_slots: Int32Array, positions: Int32Array) -> tuple[Int32Array, ...]:
        shared = positions < self._state.write_from[token_slots]
        return tuple(
            np.where(shared, np.int32(NO_WRITE), table.kv_slots(token_slots, positions))
            for table in self._tables
        )

    def _samples(
        self, row_slots: Int32Array, cu_seqlens_q: Int32Array
    ) -> tuple[Int32Array, Int32Array]:
        """(query token, receiving slot) of every draw; forks repeat their parent's token."""
        last_token = np.zeros(len(self._state.sequences), np.int32)
        last_token[row_slots] = cu_seqlens_q[1:] - 1
        forks = np.array(self._forks, np.int32).reshape(-1, 2)
        receivers = np.concatenate((*self._sampled, forks[:, 0])).astype(np.int32)
        sources = np.concatenate((*self._sampled, forks[:, 1])).astype(np.int32)
        return last_token[sources], receivers

    def _scores(
        self, token_slots: Int32Array, positions: Int32Array
    ) -> tuple[Int32Array, Int32Array]:
        """Query tokens whose logits score the next prompt token, and those next tokens."""
        state = self._state
        first = state.score_from[token_slots]
        wanted = (positions >= first - 1) & (positions < state.num_prompt[token_slots] - 1)
        tokens = np.flatnonzero(wanted).astype(np.int32)
        return tokens, state.token_ids[token_slots[tokens], positions[tokens] + 1]

    def _score_records(
        self,
        rows: Int32Array,
        token_slots: Int32Array,
        positions: Int32Array,
        score_tokens: Int32Array,
    ) -> list[tuple[int, int, int, int, int]]:
        if not len(score_tokens):
            return []
        _, firsts, counts = np.unique(rows[score_tokens], return_index=True, return_counts=True)
        records = []
        for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
            token = score_tokens[first]
            slot = int(token_slots[token])
            epoch = int(self._state.epoch[slot])
            records.append((slot, epoch, int(positions[token]) + 1, first, first + count))
        return records

    def _score_top(self, slots: Int32Array) -> int:
        asked = [
            self._occupant(slot).request.params.prompt_logprobs or 0
            for slot in slots[self._state.score_from[slots] != NEVER].tolist()
        ]
        return max(asked, default=0)

    def _completed(self, slots: Int32Array, ends: Int32Array) -> list[tuple[int, int]]:
        state = self._state
        done = slots[~state.samples[slots] & (ends == state.compute_end[slots])]
        return list(zip(done.tolist(), state.epoch[done].tolist(), strict=True))

    def _occupant(self, slot: int) -> Sequence:
        sequence = self._state.sequences[slot]
        assert sequence is not None
        return sequence

    def _new_sequence(self, slot: int) -> NewSequence:
        sequence = self._occupant(slot)
        request = sequence.request
        return NewSequence(
            slot=slot,
            token_ids=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            params=request.params,
            noise_key=sequence.noise_key,
            sample_index=sequence.sample_index,
            end_token_ids=sequence.end_token_ids,
            pooling=request.pooling if request.task is Task.EMBED else None,
        )
