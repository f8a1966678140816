"""Tile shapes of the GPU attention kernel, by size of an element and of a head. No torch.

Decoding is bound by bandwidth: 16 query rows, the least that a tensor core takes, and tiles of
16 KiB of keys and of values. Prefill is bound by the tensor cores: 64 rows are one wgmma of a group
of four warps, and several programs on a multiprocessor take turns at products and softmax.
Products of fp32 run on plain cores, in small tiles: tensor cores would round factors to tf32.

Measured: 2-byte queries and head_dim 128 on sm_90, an H200 (benchmarks/results/2026-11-26-gpu-h200-
tune.json; 8-bit caches: 2026-11-27-gpu-h200-tune-8bit-keys.json). All other shapes are derived and
were only compiled and checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchwright.errors import ShapeError

KEY_GRANULE = 128
"""Key ranges start and are cut at multiples of this, a multiple of every tile's number of keys."""

MAX_ROWS = 128


@dataclass(frozen=True, slots=True)
class TileShape:
    """One configuration of the kernel.

    Attributes:
        num_rows: query rows (tokens x heads of a group) of a program, a power of two.
        num_keys: keys of one step of its loop, a power of two that divides KEY_GRANULE.
        num_warps, num_stages: as Triton means them.
    """

    num_rows: int
    num_keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """Both configurations: few rows (decoding) and many (prefill, shared prefixes)."""

    narrow: TileShape
    wide: TileShape


def choose_tiling(
    group_size: int,
    head_dim: int,
    element_bytes: int,
    *,
    architecture: int = 90,
    kv_cache_dtype: str = "auto",
) -> Tiling:
    """Tile shapes for a layer.

    Args:
        group_size: query heads per kv head, at most 128.
        head_dim: at most 256.
        element_bytes: of queries: 2 or 4.
        architecture: ten times the compute capability, such as 80, 89 or 90.
        kv_cache_dtype: of keys and values: "int8", "fp8" or else that of queries.
    Raises:
        ShapeError: the group or the head is too large.
    """
    if not 1 <= group_size <= MAX_ROWS or not 1 <= head_dim <= 256:
        raise ShapeError(
            f"GPU attention: {group_size} query heads per kv head and head_dim {head_dim}; "
            f"the limits are {MAX_ROWS} and 256. Use the CPU for this model"
        )
    # Half of the stages are spent on the block table's entry, which a tile's address needs; wgmma
    # holds one more buffer than num_stages alone gives. All shapes fit the 99 KiB of an L40S, but
    # for those of Hopper alone: its 228 KiB hold two wide programs of 113 KiB.
    wide_stages = 3 if architecture >= 90 else 5
    if element_bytes == 4:
        if head_dim > 128:
            narrow, wide = TileShape(16, 16, 4, 1), TileShape(16, 16, 4, 1)
        elif head_dim > 64:
            narrow, wide = TileShape(16, 16, 4, 2), TileShape(32, 16, 8, 2)
        else:
            narrow, wide = TileShape(16, 32, 4, 2), TileShape(32, 32, 8, 2)
    elif head_dim > 128:
        narrow, wide = TileShape(16, 32, 4, 5), TileShape(64, 32, 8, 3)
    elif head_dim > 64 and architecture // 10 == 9:
        # Against (16, 64, 4, 5), (128, 64, 8, 3) on an H200 (...-tune-first.json): 64 rows of 2,048
        # keys 137 us instead of 139, 8 of 16,384 134 instead of 140; a prompt of 4,096 tokens 330
        # us instead of 474. Tried later, (128, 32, 4, 5) was faster for 16 chunks of 128 tokens
        # (104 us instead of 120), slower for that prompt (339 instead of 325).
        narrow, wide = TileShape(16, 64, 2, 3), TileShape(64, 64, 4, 5)
    elif head_dim > 64:
        narrow, wide = TileShape(16, 64, 4, 5), TileShape(128, 64, 8, wide_stages)
    else:
        narrow, wide = TileShape(16, 128, 4, 5), TileShape(128, 128, 8, wide_stages)
    if kv_cache_dtype in ("int8", "fp8"):  # widened in registers; some shapes above have too few
        if element_bytes == 4:
            narrow, wide = TileShape(16, 16, 4, 1), TileShape(16, 16, 8, 1)
        elif head_dim > 128:
            narrow, wide = TileShape(16, 32, 4, 3), TileShape(64, 32, 8, 3)
        elif head_dim > 64 and architecture // 10 == 9:
            # 256 rows of 1,024 keys with 4, 2 and 1 warps: in fp8 214, 169 and 141 us, in int8 272,
            # 191 (64 keys) and 173 (32 keys); in bf16 252. A prompt of 2,048 tokens with 8 and 4
            # warps: in int8 351 and 190; in fp8 widened to bf16 306 and 173, to fp16 151, then
            # with 5 stages 140; in bf16 95.
            num_keys, num_stages = (64, 3) if kv_cache_dtype == "fp8" else (32, 4)
            narrow, wide = TileShape(16, num_keys, 1, num_stages), TileShape(64, 64, 4, 5)
        else:
            narrow, wide = TileShape(16, 64, 4, 3), TileShape(64, 64, 8, 3)
    return Tiling(_hold(narrow, group_size), _hold(wide, group_size))


def _hold(shape: TileShape, group_size: int) -> TileShape:
    """The shape with enough rows for one token's heads, and a warp for each 16 added rows."""
    rows = max(shape.num_rows, 1 << (group_size - 1).bit_length())
    if rows == shape.num_rows:
        return shape
    return TileShape(rows, shape.num_keys, max(shape.num_warps, rows // 16), shape.num_stages)
