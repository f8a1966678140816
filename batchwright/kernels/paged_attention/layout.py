"""Layout of the paged KV cache of the CPU kernels.

k_cache [num_blocks, num_kv_heads, head_dim, block_size]: keys are stored transposed inside a block,
    so that the scores of 32 keys are vectors and need no horizontal sums;
v_cache [num_blocks, num_kv_heads, block_size, padded head_dim]: a row holds head_dim values and is
    padded to a multiple of 8 so that a vector never leaves it; the padding is never used.

Both C-contiguous, and fp32 or uint16, the bits of bf16. One (block, head) is one contiguous piece
of each.
"""

from __future__ import annotations

from batchwright.errors import ConfigError

KEYS_PER_VECTOR_TILE = 32
"""Block sizes are multiples of this many keys, so a vector tile of keys never spans blocks."""


def cache_shapes(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shapes of (k_cache, v_cache) of one layer, to be allocated C-contiguous.

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
        (num_blocks, num_kv_heads, head_dim, block_size),
        (num_blocks, num_kv_heads, block_size, padded_dim),
    )
