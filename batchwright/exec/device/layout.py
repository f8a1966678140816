"""Layout: many small arrays in one buffer, so that a step's inputs are one transfer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 16
"""Bytes; what Triton's kernels need for wide loads."""

Array = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_TORCH = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


class Layout:
    """Where named int32 and int64 arrays lie in a buffer of bytes.

    Args:
        sections: dtype and shape by name.
        start: first byte, a multiple of ALIGNMENT.

    Attributes:
        end: first byte after the last array, a multiple of ALIGNMENT.
    """

    def __init__(
        self,
        sections: Mapping[str, tuple[npt.DTypeLike, tuple[int, ...]]],
        start: int = 0,
    ) -> None:
        self._places: dict[str, tuple[np.dtype[np.generic], tuple[int, ...], int, int]] = {}
        at = start
        for name, (dtype, shape) in sections.items():
            kind = np.dtype(dtype)
            size = int(np.prod(shape)) * kind.itemsize
            self._places[name] = kind, shape, at, at + size
            at += -(-size // ALIGNMENT) * ALIGNMENT
        self.end = at

    @classmethod
    def of(cls, arrays: Mapping[str, Array], start: int = 0) -> Layout:
        """Just large enough for these arrays."""
        sections = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        return cls(sections, start)

    def write(self, arrays: Mapping[str, Array], buffer: Bytes) -> None:
        """Copy arrays into the buffer. A section that is longer than its array ends in zeros."""
        for name, (dtype, shape, first, end) in self._places.items():
            place, array = buffer[first:end].view(dtype).reshape(shape), arrays[name]
            place[: len(array)] = array
            place[len(array) :] = 0

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays in a buffer of bytes on a device."""
        return {
            name: buffer[first:end].view(_TORCH[dtype]).view(shape)
            for name, (dtype, shape, first, end) in self._places.items()
        }
