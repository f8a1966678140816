"""KVGroup: layers that share one block table and one lifetime rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_SIZE = 32
"""Default tokens per block: the multiple that quantised caches need (docs/architecture.md)."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """One KV group.

    Attributes:
        window: a token's KV is dead once the sequence is this many tokens past it; None: never.
        num_blocks: blocks of the group's pool.
        num_host_blocks: blocks that the host keeps when the device has no room for them.
    """

    window: int | None
    num_blocks: int
    num_host_blocks: int = 0


def windows_of_layers(windows: Sequence[int | None]) -> tuple[list[int | None], list[int]]:
    """Distinct windows (full attention first, then by size) and the group index of each layer."""
    distinct = sorted(set(windows), key=lambda window: (window is not None, window or 0))
    return distinct, [distinct.index(window) for window in windows]


def blocks_per_sequence(
    window: int | None, num_tokens: int, block_size: int, max_chunk: int
) -> int:
    """Most blocks one sequence of `num_tokens` holds at once in a group.

    A windowed sequence keeps its window and the chunk being computed, which may begin and end
    inside a block.
    """
    whole = -(-num_tokens // block_size)
    if window is None:
        return whole
    return min(whole, -(-(window + max_chunk) // block_size) + 1)


def split_blocks(
    kv_bytes: int,
    windows: Sequence[int | None],
    block_bytes: Sequence[int],
    *,
    block_size: int,
    max_model_len: int,
    max_chunk: int,
) -> list[KVGroup]:
    """Divide a memory budget so that all groups run full at the same number of long sequences.

    Args:
        kv_bytes: bytes for all groups.
        windows, block_bytes: per group: its window, and the bytes of one block in all its layers.
    """
    needs = [blocks_per_sequence(w, max_model_len, block_size, max_chunk) for w in windows]
    per_sequence = sum(need * size for need, size in zip(needs, block_bytes, strict=True))
    return [
        KVGroup(window, kv_bytes * need // per_sequence)
        for window, need in zip(windows, needs, strict=True)
    ]
