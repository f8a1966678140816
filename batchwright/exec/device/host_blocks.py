"""HostBlocks: keys and values in the host's memory, and the copies to it and from it.

A block lies in pieces on the device, by layer, and in one piece on the host. It goes through a
buffer on the device: gathered or scattered on the stream that computes, copied over the bus on a
stream of its own, one for each direction. So a step waits for what it saves only until that is in
the buffer, and what it loads crosses the bus while the step before is computed. Two buffers a
direction take turns.

On a CPU the same copies are made one after the other, for tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

BUFFER_BYTES = 64 << 20
"""Of each of the four buffers, or one block if that is more."""

SLAB_BYTES = 256 << 20
"""The host's memory is pinned in parts of this size, when they are first needed: pinning takes
a good part of a second a gigabyte."""


class HostBlocks:
    """Blocks of one KV group on the host.

    Args:
        kv: the group's keys and values, [num_layers, 2, num_blocks, num_kv_heads, block_size,
            head_dim]; only its shape, type and device matter here.
        num_blocks: the most there can be.
    """

    def __init__(self, kv: torch.Tensor, num_blocks: int) -> None:
        num_layers, two, _, *rest = kv.shape
        self._block = (num_layers, two, *rest)
        self._dtype, self._num_blocks = kv.dtype, num_blocks
        block_bytes = torch.Size(self._block).numel() * kv.element_size()
        self._per_slab = max(SLAB_BYTES // block_bytes, 1)
        self._slabs: dict[int, torch.Tensor] = {}
        per_buffer = max(min(BUFFER_BYTES // block_bytes, num_blocks), 1)
        self._is_pinned = kv.is_cuda
        self._saving = _Bus((per_buffer, *self._block), kv)
        self._loading = _Bus((per_buffer, *self._block), kv)
        self._just_saved: set[int] = set()

    def save(self, kv: torch.Tensor, block_ids: torch.Tensor, host_ids: list[int]) -> None:
        """Copy blocks to the host, as the stream that computes leaves them. To be called in every
        step that loads, before it does.

        Args:
            block_ids: [n] int64, on the device.
            host_ids: [n].
        """
        bus, self._just_saved = self._saving, set(host_ids)
        bus.begin_step()
        for part in bus.parts(len(host_ids)):
            places = [self._place(host_id) for host_id in host_ids[part]]
            buffer = bus.next_buffer(len(places))
            bus.computing_waits_for_buffer()
            buffer.copy_(kv.index_select(2, block_ids[part]).movedim(2, 0))
            with bus.used(waits_for_computing=True):
                for block, place in zip(buffer, places, strict=True):
                    place.copy_(block, non_blocking=True)
                bus.buffer_is_free()

    def load(self, kv: torch.Tensor, host_ids: list[int], block_ids: torch.Tensor) -> None:
        """Copy blocks back, before what the stream that computes is given next. Arguments as those
        of `save`."""
        bus = self._loading
        bus.wait_for(self._saving, this_step=not self._just_saved.isdisjoint(host_ids))
        for part in bus.parts(len(host_ids)):
            places = [self._place(host_id) for host_id in host_ids[part]]
            buffer = bus.next_buffer(len(places))
            with bus.used(waits_for_computing=False):
                bus.waits_for_buffer()
                for block, place in zip(buffer, places, strict=True):
                    block.copy_(place, non_blocking=True)
            bus.computing_waits()
            kv.index_copy_(2, block_ids[part], buffer.movedim(0, 2))
            bus.buffer_is_free()

    def _place(self, host_id: int) -> torch.Tensor:
        """One block of the host's memory."""
        number, index = divmod(host_id, self._per_slab)
        if number not in self._slabs:
            size = min(self._per_slab, self._num_blocks - number * self._per_slab)
            self._slabs[number] = torch.empty(
                (size, *self._block), dtype=self._dtype, pin_memory=self._is_pinned
            )
        return self._slabs[number][index]


class _Bus:
    """One direction of the bus: its stream, two buffers on the device, and who waits for whom.

    Without a GPU nobody waits.
    """

    def __init__(self, shape: tuple[int, ...], kv: torch.Tensor) -> None:
        self._buffers = [torch.empty(shape, dtype=kv.dtype, device=kv.device) for _ in range(2)]
        self._turn = 0
        self._stream: torch.cuda.Stream | None = None
        if kv.is_cuda:
            self._stream = torch.cuda.Stream(kv.device)
            self._free = [torch.cuda.Event() for _ in self._buffers]
            self._begun = torch.cuda.Event()  # what earlier steps have copied

    def parts(self, num_blocks: int) -> Iterator[slice]:
        """What goes through a buffer at once."""
        size = len(self._buffers[0])
        return (slice(first, first + size) for first in range(0, num_blocks, size))

    def next_buffer(self, num_blocks: int) -> torch.Tensor:
        """[num_blocks, ...] of the buffer whose turn it is."""
        self._turn = 1 - self._turn
        return self._buffers[self._turn][:num_blocks]

    def begin_step(self) -> None:
        """What was copied until now belongs to earlier steps."""
        if self._stream is not None:
            self._begun.record(self._stream)

    def wait_for(self, other: _Bus, *, this_step: bool) -> None:
        """Copy nothing more before the other direction has done what it was given, in earlier
        steps or in this one too."""
        if self._stream is None or other._stream is None:
            return
        if this_step:
            self._stream.wait_stream(other._stream)
        else:
            self._stream.wait_event(other._begun)

    @contextlib.contextmanager
    def used(self, *, waits_for_computing: bool) -> Iterator[None]:
        """What is copied inside is copied on this stream."""
        if self._stream is None:
            yield
            return
        if waits_for_computing:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def computing_waits(self) -> None:
        """The stream that computes waits for all that was copied."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def buffer_is_free(self) -> None:
        """The present buffer can be used again after what the present stream was given."""
        if self._stream is not None:
            self._free[self._turn].record(torch.cuda.current_stream())

    def waits_for_buffer(self) -> None:
        """This stream waits until the present buffer is free."""
        if self._stream is not None:
            self._stream.wait_event(self._free[self._turn])

    def computing_waits_for_buffer(self) -> None:
        """The stream that computes does."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._free[self._turn])
