"""SlotLists: a list of numbers for each slot, kept on the device and sent with a step's inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from batchwright.exec.device.layout import Array
from batchwright.request import Float32Array, Int32Array

CHUNK = 16
"""Numbers that are written at one place: few places are sent, and no line is filled up by much."""


class SlotLists:
    """A line for each slot, of which the beginning counts; how much of it, its owner knows.

    Args:
        name: of the arrays in a step's inputs.
        max_num_seqs: slots.
        longest: list that a line has room for at first.
        dtype: int32 or float32.

    Attributes:
        lines: [max_num_seqs, any] dtype, on the device; another tensor after a list that had no
            room. What was queued before keeps the memory of the old one.
    """

    def __init__(
        self,
        name: str,
        max_num_seqs: int,
        longest: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._name = name
        width = CHUNK * _num_chunks(longest)
        self.lines = torch.zeros((max_num_seqs, width), dtype=dtype, device=device)

    def inputs(self, lists: Mapping[int, Int32Array | Float32Array]) -> dict[str, Array]:
        """What `apply` needs on the device so that these slots have these lists; none if empty.

        Args:
            lists: by slot, not empty, of the dtype of `lines`.
        """
        if not lists:
            return {}
        counts = np.array([_num_chunks(len(one)) for one in lists.values()])
        self._widen(CHUNK * int(counts.max()))
        ends = counts.cumsum()
        first = np.array(list(lists)) * (self.lines.shape[1] // CHUNK)
        places = np.repeat(first - (ends - counts), counts) + np.arange(ends[-1])
        numbers: Int32Array = np.zeros(CHUNK * int(ends[-1]), np.int32)
        for start, one in zip((CHUNK * (ends - counts)).tolist(), lists.values(), strict=True):
            numbers[start : start + len(one)] = one.view(np.int32)
        return {f"{self._name}_places": places, self._name: numbers.reshape(-1, CHUNK)}

    def apply(self, views: Mapping[str, torch.Tensor]) -> None:
        """Write what has come; `views` are `inputs` on the device. Queued, nothing waits."""
        if self._name in views:
            chunks = self.lines.view(-1, CHUNK)
            numbers = views[self._name].view(self.lines.dtype)
            chunks.index_copy_(0, views[f"{self._name}_places"], numbers)

    def _widen(self, width: int) -> None:
        """Room for `width` numbers in a line: at least twice the old, so that it seldom happens."""
        old = self.lines
        if width > old.shape[1]:
            self.lines = old.new_zeros(len(old), max(width, 2 * old.shape[1]))
            self.lines[:, : old.shape[1]] = old


def _num_chunks(count: int) -> int:
    return -(-count // CHUNK)
