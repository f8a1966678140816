"""The Numba kernels with keys and values in int8: a quarter of the memory, and scales.

Lossy: the components of a key, or value, of one head become multiples of the largest of them / 127
as they are written. That scale depends on nothing else, and what is computed with the numbers is
fp32, so the level is bits as with `numba`: a row's bits do not depend on other rows.
"""

from __future__ import annotations

import numpy as np
import torch

from batchwright.attention.backends import numba


class Backend(numba.Backend):
    """See `numba.Backend`."""

    stored_dtype = np.int8

    def element_bytes(self, dtype: torch.dtype, head_dim: int) -> float:
        return 1 + 4 / head_dim  # an fp32 scale for each head's key and value
