"""Memory that begins on a cache line, so that vectors of 16 fp32 lanes lie in one line."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

CACHE_LINE_BYTES = 64


def aligned_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros of a shape, C-contiguous. np.zeros takes pages only when they are first written."""
    itemsize = np.dtype(dtype).itemsize
    size = math.prod(shape)
    memory = np.zeros(size + CACHE_LINE_BYTES // itemsize, dtype)
    start = -memory.ctypes.data % CACHE_LINE_BYTES // itemsize
    return memory[start : start + size].reshape(shape)
