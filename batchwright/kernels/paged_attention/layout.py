"""Layout of the paged KV cache of the CPU kernels.

k_cache [num_blocks, num_kv_heads, head_dim, block_size]: keys are stored transposed inside a block,
    so that the scores of 32 keys are vectors and need no horizontal sums;
v_cache [num_blocks, num_kv_heads, block_size, padded head_dim]: a row holds head_dim values and is
    padded to a multiple of 8 so that a vector never leaves it; the padding is never used.

Both C-contiguous, and fp32, uint16, the bits of bf16, or int8. One (block, head) is one contiguous
piece of each.

An int8 component stands for itself times a scale that its token's key, or value, has in that head.
The scales lie behind the keys, in SCALE_ROWS more rows of k_cache: fp32, [block_size] of the keys,
then [block_size] of the values. So whoever copies blocks copies them too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from batchwright.errors import ConfigError

SCALE_ROWS = 8
"""Rows of an int8 k_cache that hold two fp32 numbers for each of its tokens."""

KEYS_PER_VECTOR_TILE = 32
"""Block sizes are multiples of this many keys, so a vector tile of keys never spans blocks."""


def cache_shapes(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, *, has_scales: bool = False
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shapes of (k_cache, v_cache) of one layer, to be allocated C-contiguous.

    Args:
        has_scales: they are int8.
    Raises:
        ConfigError: block_size is not a positive multiple of 32.
    """
    if block_size <= 0 or block_size % KEYS_PER_VECTOR_TILE:
        raise ConfigError(
            f"block_size is {block_size}; CPU attention needs a positive multiple of "
            f"{KEYS_PER_VECTOR_TILE}"
        )
    padded_dim = -(-head_dim // 8) * 8
    return (
        (num_blocks, num_kv_heads, head_dim + SCALE_ROWS * has_scales, block_size),
        (num_blocks, num_kv_heads, block_size, padded_dim),
    )


def scales_of(k_cache: npt.NDArray[np.int8]) -> npt.NDArray[Any]:
    """[num_blocks, num_kv_heads, 2, block_size] fp32: a view of the scales in an int8 k_cache, of
    keys and of values."""
    num_blocks, num_kv_heads, num_rows, block_size = k_cache.shape
    rows = k_cache.reshape(num_blocks, num_kv_heads, num_rows * block_size)
    scales = rows[:, :, (num_rows - SCALE_ROWS) * block_size :].view(np.float32)
    return scales.reshape(num_blocks, num_kv_heads, 2, block_size)
