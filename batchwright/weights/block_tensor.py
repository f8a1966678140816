"""A weight as quantised files store it: small integers, in blocks that share a scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FORM_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.25, "int4": 0.75}
"""Bytes that a weight takes in memory, by how it is stored: integers with two fp32 for every 32."""

Int8Array = npt.NDArray[np.int8]
Float32Array = npt.NDArray[np.float32]


class BlockTensor(NamedTuple):
    """[rows, columns] values: integer * step + lowest, of the block that the column is in.

    In fp32 and in that order. The product is exact or nothing is added to it, so a fused
    multiply-add gives the same.

    Attributes:
        bits: of an integer, 4 or 8. Of 4 bits they are -8 to 7 without a lowest value, else 0 to
            15.
        integers: [rows, columns] int8.
        steps: [rows, columns / block] fp32.
        lowest: as steps, or None where nothing is added.
    """

    bits: int
    integers: Int8Array
    steps: Float32Array
    lowest: Float32Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.integers.shape

    @property
    def block(self) -> int:
        """Columns that share a step."""
        return self.integers.shape[1] // self.steps.shape[1]

    def dense(self) -> Float32Array:
        """[rows, columns] fp32."""
        values = self.integers.astype(np.float32)
        blocks = values.reshape(*self.steps.shape, -1)
        with np.errstate(all="ignore"):  # a damaged scale may be inf or nan: that is its value
            blocks *= self.steps[..., None]
            if self.lowest is not None:
                blocks += self.lowest[..., None]
        return values

    def reorder(self, order: Callable[[Any], Any]) -> BlockTensor:
        """With rows in another order; `order` does that to an array whose first axis they are."""
        return BlockTensor(
            self.bits,
            order(self.integers),
            order(self.steps),
            None if self.lowest is None else order(self.lowest),
        )

    def from_zero(self) -> BlockTensor:
        """The same 4-bit values with integers from 0 to 15."""
        if self.lowest is not None:
            return self
        return BlockTensor(4, self.integers + np.int8(8), self.steps, self.steps * np.float32(-8))

    def as_bytes(self, block: int) -> BlockTensor:
        """The same values as 8-bit integers, in smaller blocks."""
        repeats = self.block // block
        lowest = np.zeros_like(self.steps) if self.lowest is None else self.lowest
        return BlockTensor(
            8, self.integers, self.steps.repeat(repeats, 1), lowest.repeat(repeats, 1)
        )
