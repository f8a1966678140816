"""Transfer: what goes to the device and comes back, through pinned memory that is used in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from batchwright.exec.device.layout import Bytes

NUM_TURNS = 3
"""Steps whose memory may be in use at once: two handed out and one being made."""


class Upload:
    """Bytes to the device, one copy a step, in stream order.

    Args:
        num_bytes: of the buffers at first; they grow.
        device: where to.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._pin = device.type == "cuda"
        self._host = [self._buffer(num_bytes) for _ in range(NUM_TURNS)]
        self._copied: list[torch.cuda.Event | None] = [None] * NUM_TURNS
        self._turn = 0
        self.there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        """What was sent last; the same memory for all that fits."""

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._pin)

    def begin(self, num_bytes: int) -> Bytes:
        """Memory of at least so many bytes to write to, until `send`."""
        self._turn = (self._turn + 1) % NUM_TURNS
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        if len(self._host[self._turn]) < num_bytes:
            self._host[self._turn] = self._buffer(2 * num_bytes)
        buffer: Bytes = self._host[self._turn].numpy()
        return buffer

    def send(self, num_bytes: int) -> torch.Tensor:
        """Copy the first bytes of what was written; returns where they are."""
        host = self._host[self._turn][:num_bytes]
        if num_bytes > len(self.there):
            there = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        else:
            there = self.there
        there[:num_bytes].copy_(host, non_blocking=True)
        if self._pin:
            event = self._copied[self._turn] or torch.cuda.Event()
            event.record()
            self._copied[self._turn] = event
        return there


class Arriving:
    """Tensors that are on their way to the host.

    Args:
        tensors: on the host, being written.
        event: recorded after the copies; None: they are done.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], event: torch.cuda.Event | None) -> None:
        self._tensors, self._event = tensors, event

    def wait(self) -> list[Any]:
        """What has come, as numpy arrays on the memory that it came to; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def fetch(tensors: Sequence[torch.Tensor]) -> Arriving:
    """Begin to copy tensors, all on one device, into pinned memory of their own."""
    pin = any(tensor.is_cuda for tensor in tensors)
    places = [torch.empty(x.shape, dtype=x.dtype, pin_memory=pin) for x in tensors]
    return _copied(tensors, places, pin)


def _copied(
    tensors: Sequence[torch.Tensor], places: Sequence[torch.Tensor], pinned: bool
) -> Arriving:
    for there, here in zip(tensors, places, strict=True):
        here.copy_(there, non_blocking=True)
    event = None
    if pinned:
        event = torch.cuda.Event()
        event.record()
    return Arriving(places, event)


class Download:
    """Drawn tokens from the device, without waiting.

    Args:
        num_tokens: the most of one step.
    """

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self._pin = device.type == "cuda"
        self._host = [
            torch.empty(num_tokens, dtype=torch.int32, pin_memory=self._pin)
            for _ in range(NUM_TURNS + 1)
        ]
        self._turn = 0

    def start(self, token_ids: torch.Tensor) -> Arriving:
        """Begin to copy [n] int32 tokens, to memory that serves again some steps later."""
        self._turn = (self._turn + 1) % len(self._host)
        return _copied([token_ids], [self._host[self._turn][: len(token_ids)]], self._pin)
