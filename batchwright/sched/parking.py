"""Parking: the KV of preempted sequences that the host keeps until they go on.

Blocks of prompts are the prefix cache's, on the device or on the host; kept here is what comes
after them, of sequences that draw tokens. A sequence goes on from its kept tokens if its prompt's
blocks are still there, and computes them again if not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from batchwright.kv.block_table import BlockTable
from batchwright.kv.host_memory import HostMemory
from batchwright.kv.prefix_cache import PrefixCache
from batchwright.request import Int32Array
from batchwright.sched.slots import Slots
from batchwright.sequence import Sequence


class _Parked(NamedTuple):
    """Blocks [first, first + len(host_ids)) of a sequence, those after its prompt's."""

    first: int
    host_ids: Int32Array
    num_computed: int


class Parking:
    """Empty at first.

    Args:
        slots: running sequences.
        table: blocks of the only KV group.
        cache: which makes room on the host for sequences.
        host: keeps the blocks; if it has none, nothing is ever kept.
    """

    def __init__(
        self, slots: Slots, table: BlockTable, cache: PrefixCache, host: HostMemory
    ) -> None:
        self._slots, self._table, self._cache, self._host = slots, table, cache, host
        self._parked: dict[Sequence, _Parked] = {}

    def park(self, slot: int) -> None:
        """A slot is about to lose its sequence: keep what its prompt's blocks do not hold.

        Less than a block's worth of tokens, as inside a prompt, is sooner computed again.
        """
        sequence = self._slots.sequences[slot]
        assert sequence is not None
        if not (self._host and sequence.samples) or sequence.score_start is not None:
            return
        if sequence.request.layout is not None:
            return
        num_computed, block_size = int(self._slots.num_computed[slot]), self._table.block_size
        first = min(len(sequence.nodes), num_computed // block_size)
        end = -(-num_computed // block_size)
        if num_computed - first * block_size < block_size:
            return
        self._cache.make_room_on_host(end - first)
        if self._host.num_free >= end - first:
            host_ids = self._host.save(self._table.table[slot, first:end].copy())
            self._parked[sequence] = _Parked(first, host_ids, num_computed)

    def num_computed(self, sequence: Sequence, num_matched: int) -> int:
        """Tokens that need not be computed if a sequence starts on so many blocks of its prompt."""
        parked = self._parked.get(sequence)
        return parked.num_computed if parked is not None and num_matched >= parked.first else 0

    def load(self, slot: int) -> None:
        """A parked sequence has a slot, with blocks for all its tokens: fill those it has kept."""
        sequence = self._slots.sequences[slot]
        assert sequence is not None
        first, host_ids, _ = self._parked.pop(sequence)
        blocks = self._table.table[slot, first : first + len(host_ids)]
        self._host.load(host_ids, blocks.copy())

    def forget(self, sequence: Sequence) -> None:
        """A sequence will not go on from its kept tokens."""
        parked = self._parked.pop(sequence, None)
        if parked is not None:
            self._host.forget(parked.host_ids)

    def clear(self) -> None:
        """What is kept cannot be trusted."""
        for sequence in list(self._parked):
            self.forget(sequence)

    def held(self) -> Int32Array:
        """Blocks of the host that are kept, for the integrity check."""
        return np.concatenate(
            [np.empty(0, np.int32), *(parked.host_ids for parked in self._parked.values())]
        )
