"""Transfer: what goes to the device and comes back, through pinned memory that is used in turn."""

from __future__ import annotations

import numpy as np
import torch

from batchwright.exec.device.layout import Bytes
from batchwright.exec.device.sampler import Logprobs
from batchwright.request import Int32Array
from batchwright.step import TokenLogprobs

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

    def start(self, token_ids: torch.Tensor, logprobs: Logprobs | None = None) -> Arriving:
        """Begin to copy [n] int32 tokens, and what is told of them."""
        self._turn = (self._turn + 1) % len(self._host)
        place = self._host[self._turn][: len(token_ids)]
        place.copy_(token_ids, non_blocking=True)
        told = None
        if logprobs is not None:
            told = [torch.empty(x.shape, dtype=x.dtype, pin_memory=self._pin) for x in logprobs]
            for there, here in zip(logprobs, told, strict=True):
                here.copy_(there, non_blocking=True)
        event = None
        if self._pin:
            event = torch.cuda.Event()
            event.record()
        return Arriving(place, told, event)


class Arriving:
    """Tokens that are on their way."""

    def __init__(
        self,
        place: torch.Tensor,
        told: list[torch.Tensor] | None,
        event: torch.cuda.Event | None,
    ) -> None:
        self._place, self._told, self._event = place, told, event

    def wait(self) -> tuple[Int32Array, TokenLogprobs | None]:
        """([n] int32, a copy, and log-probabilities if any were drawn); waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        logprobs = None
        if self._told is not None:
            logprobs = TokenLogprobs(*(column.numpy() for column in self._told))
        return np.array(self._place.numpy(), np.int32), logprobs
