"""SegmentCache: which segments of prompts are encoded, in which blocks, and which are wanted.

A segment is encoded by a sequence of its own (an encoder), which starts when a row that needs it
is next. Its blocks then stay until memory is short: first those go that no row waits for, then
those that were wanted longest ago. A row copies what it needs into its own blocks when it starts,
token by token, because segments do not end where blocks end.

Not the prefix cache: segments are found by themselves (tokens and positions), not by what stands
before them, and nothing computed without a `PromptLayout` ever reads them. One full KV group only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from batchwright.kv.block_table import BlockTable
from batchwright.prompt_layout import PromptLayout, Segment
from batchwright.request import Int32Array

_NO_BLOCKS: Int32Array = np.empty(0, np.int32)


@dataclass(slots=True, eq=False)
class _Entry:
    """What is known of a segment.

    Attributes:
        num_waiting: rows not started that need it.
        is_encoding: an encoder runs for it.
        blocks: where its keys and values are, one reference each; empty if nowhere.
        ready_from: first schedule whose Step may read them.
        wanted_at: the last schedule in which a row needed it.
    """

    num_waiting: int = 0
    is_encoding: bool = False
    blocks: Int32Array = field(default_factory=lambda: _NO_BLOCKS)
    ready_from: int = 0
    wanted_at: int = -1


class SegmentCache:
    """See the module docstring.

    Args:
        table: the blocks of running sequences, in the KV group of all layers.

    Attributes:
        num_encoded: segments encoded so far, again if they had been evicted.
    """

    def __init__(self, table: BlockTable) -> None:
        self._table = table
        self._entries: dict[Segment, _Entry] = {}
        self._now = 0  # schedules so far
        self.num_encoded = 0

    def __bool__(self) -> bool:
        return bool(self._entries)

    # Who wants what ---------------------------------------------------------------------------

    def wait(self, layout: PromptLayout, num_rows: int = 1) -> None:
        """So many rows more wait for a layout's segments."""
        for segment in layout.segments:
            self._entries.setdefault(segment, _Entry()).num_waiting += num_rows

    def no_longer_wait(self, layout: PromptLayout) -> None:
        """One row less waits for them."""
        for segment in layout.segments:
            entry = self._entries[segment]
            entry.num_waiting -= 1
            self._forget_if_unused(segment, entry)

    def want(self, layout: PromptLayout) -> list[Segment]:
        """A row would start now: keep its segments in this Step. Returns those that are absent.

        A segment that an encoder works on, or whose Step is not handed out, is absent too.
        """
        missing = []
        for segment in layout.segments:
            entry = self._entries[segment]
            entry.wanted_at = self._now
            if not len(entry.blocks) or entry.ready_from > self._now:
                missing.append(segment)
        return missing

    def is_encoding(self, segment: Segment) -> bool:
        """Whether an encoder works on a segment, or has just been scheduled to its end."""
        entry = self._entries[segment]
        return entry.is_encoding or len(entry.blocks) > 0

    # Encoding ---------------------------------------------------------------------------------

    def begin_schedule(self) -> None:
        """A new Step is made: what the last one encodes may be read by it."""
        self._now += 1

    def begin_encoding(self, segment: Segment) -> None:
        """An encoder has started."""
        self._entries[segment].is_encoding = True

    def keep(self, segment: Segment, slot: int) -> None:
        """The last token of an encoder, in this slot, is scheduled: hold its blocks."""
        entry = self._entries.setdefault(segment, _Entry())
        if len(entry.blocks):  # it is preempted with all its tokens scheduled
            return
        table = self._table
        entry.blocks = table.table[slot, table.start[slot] : table.end[slot]].copy()
        table.pool.share(entry.blocks)
        entry.is_encoding, entry.ready_from = False, self._now + 1
        self.num_encoded += 1

    def abandon(self, segment: Segment) -> None:
        """An encoder lost its slot, perhaps before its end."""
        entry = self._entries.get(segment)
        if entry is not None:
            entry.is_encoding = False
            self._forget_if_unused(segment, entry)

    # Reading ----------------------------------------------------------------------------------

    def kv_slots(self, layout: PromptLayout, start: int) -> Int32Array:
        """[num_imported - start] int32: where the KV of a layout's imported tokens lies, from the
        token `start` on; all its segments that reach so far are resident."""
        size = np.int32(self._table.block_size)
        slots, first = [_NO_BLOCKS], 0
        for segment in layout.segments:
            end = first + segment.num_tokens
            if end > start:
                tokens = np.arange(max(start - first, 0), segment.num_tokens, dtype=np.int32)
                slots.append(self._entries[segment].blocks[tokens // size] * size + tokens % size)
            first = end
        return np.concatenate(slots)

    # Memory -----------------------------------------------------------------------------------

    def num_evictable(self) -> int:
        """Blocks that `evict` can free now."""
        return sum(len(entry.blocks) for _, entry in self._evictable())

    def evict(self, num_blocks: int, *, unneeded_only: bool = False) -> int:
        """Free about `num_blocks` blocks, in whole segments; returns how many were freed.

        Segments wanted in this Step stay: it reads them, or a row waits for the others of its own.
        """
        candidates = [
            (segment, entry)
            for segment, entry in self._evictable()
            if not (unneeded_only and entry.num_waiting)
        ]
        candidates.sort(key=lambda item: (item[1].num_waiting > 0, item[1].wanted_at))
        num_freed = 0
        for segment, entry in candidates:
            if num_freed >= num_blocks:
                break
            num_freed += len(entry.blocks)
            self._drop(entry)
            self._forget_if_unused(segment, entry)
        return num_freed

    def clear(self) -> None:
        """Give up all blocks; rows still wait."""
        for segment, entry in list(self._entries.items()):
            self._drop(entry)
            entry.is_encoding = False
            self._forget_if_unused(segment, entry)

    def held(self) -> Int32Array:
        """The cache's references, for the integrity check."""
        return np.concatenate([_NO_BLOCKS, *(entry.blocks for entry in self._entries.values())])

    def _evictable(self) -> Iterator[tuple[Segment, _Entry]]:
        counts = self._table.pool.ref_counts
        for segment, entry in self._entries.items():
            blocks = entry.blocks
            if len(blocks) and entry.wanted_at != self._now and (counts[blocks] == 1).all():
                yield segment, entry

    def _drop(self, entry: _Entry) -> None:
        if len(entry.blocks):
            self._table.pool.release(entry.blocks)
            entry.blocks = _NO_BLOCKS

    def _forget_if_unused(self, segment: Segment, entry: _Entry) -> None:
        if not entry.num_waiting and not entry.is_encoding and not len(entry.blocks):
            del self._entries[segment]


def segment_blocks(segments: Sequence[Segment], block_size: int) -> int:
    """Blocks that segments take."""
    return sum(-(-segment.num_tokens // block_size) for segment in segments)
