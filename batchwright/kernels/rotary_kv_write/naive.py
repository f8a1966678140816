"""Readable twin of rotary_kv_write: torch."""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotary embedding (arXiv:2104.09864) of the first rotary_dim components of every head.

    Args:
        x: [num_tokens, num_heads, head_dim].
        cos, sin: [max_positions, rotary_dim / 2].
        positions: [num_tokens].
        interleaved: pairs are components (2i, 2i + 1); else (i, i + rotary_dim / 2).
    """
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    out = x.clone()
    if interleaved:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2] = a * c + -b * s, b * c + a * s
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
        out[..., :half], out[..., half : 2 * half] = a * c + -b * s, b * c + a * s
    return out


def rotary_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Rotate q in place; write rotated k, and v, into the caches.

    Arguments as in numba.py; 8-bit caches and `scales` as in triton.py.
    """
    if cos is not None and sin is not None:
        q.copy_(rotate(q, cos, sin, positions, interleaved=interleaved))
        k = rotate(k, cos, sin, positions, interleaved=interleaved)
    block_size, head_dim = k_cache.shape[3], k.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            key, k_scale = stored(k[token], k_cache.dtype)
            value, v_scale = stored(v[token], v_cache.dtype)
            k_cache[block, :, :, offset] = key
            v_cache[block, :, offset, :head_dim] = value
            if scales is not None:
                scales[0][block, :, offset], scales[1][block, :, offset] = k_scale, v_scale


def stored(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x as a cache of that dtype keeps it, scales): 8 bits are lossy.

    Args:
        x: [..., head_dim].
    Returns:
        float8_e4m3fn: what is beyond 448 becomes 448; no scales. int8: x / scale rounded, halves to
        even, and scales [...], the largest absolute component / 127. Else x converted, no scales.
    """
    if dtype == torch.int8:
        largest = x.abs().amax(-1, keepdim=True)
        inverse = torch.where(largest > 0, 127 / largest, 0.0)
        return (x * inverse).round().to(dtype), largest[..., 0] / 127
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-448, 448)
    return x.to(dtype), None
