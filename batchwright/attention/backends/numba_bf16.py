"""The Numba kernels with keys and values in bf16: half the memory, and half of what decoding reads.

Lossy: each component of a key or value is rounded to 8 bits of significance as it is written. What
is computed with them is fp32, so the level is bits as with `numba`: a row's bits do not depend on
other rows.
"""

from __future__ import annotations

import numpy as np
import torch

from batchwright.attention.backends import numba


class Backend(numba.Backend):
    """See `numba.Backend`."""

    stored_dtype = np.uint16

    def element_bytes(self, dtype: torch.dtype, head_dim: int) -> float:
        return 2.0
