"""Turn GGUF's stored blocks into integers with their scales, or into fp32.

Every formula is the one that defines the format (scale times integer, plus or minus a minimum, in
fp32 and in that order), so values are bit-identical to the `gguf` package's. Source: the block
structs of the GGUF v3 specification.

Works on a fixed number of values at a time, so temporaries take a few MiB and stay in cache
whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.errors import ShapeError, UnsupportedModelError
from batchwright.weights.block_tensor import BlockTensor
from batchwright.weights.ggml_types import GgmlType

Uint8Array = npt.NDArray[np.uint8]
Int8Array = npt.NDArray[np.int8]
Float32Array = npt.NDArray[np.float32]

# Measured on SmolLM2 (135M values, 1 core): 2^18 takes 0.43 s, 2^14 twice that, 2^22 no less.
VALUES_PER_CHUNK = 1 << 18


def dequantize(raw: Uint8Array, ggml_type: GgmlType, shape: tuple[int, ...]) -> Float32Array:
    """Return the values of one tensor, or of any run of whole rows of it.

    Args:
        raw: [nbytes] uint8, the stored blocks.
        shape: row-major; its product is what `raw` holds.
    Returns:
        A new fp32 array of that shape, which shares no memory with raw.
    Raises:
        UnsupportedModelError: a type that is not listed in SUPPORTED_TYPES.
        ShapeError: raw and shape disagree.

    Exactness: bits (equal to the format's definition evaluated in fp32).
    """
    blocks = _as_blocks(raw, ggml_type, shape)
    out = np.empty((len(blocks), ggml_type.block_size), np.float32)
    for start, some in _chunks(blocks, ggml_type):
        values = out[start : start + len(some)]
        if ggml_type.name in _FLOATS:
            _FLOATS[ggml_type.name](some, values)
        else:
            values[...] = _integers(some, ggml_type).dense()
    return out.reshape(shape)


def read_blocks(raw: Uint8Array, ggml_type: GgmlType, shape: tuple[int, int]) -> BlockTensor:
    """Return the integers and scales of a tensor of two dimensions, not one of floats.

    Args, Raises: as `dequantize`, whose values are those of the result.
    """
    blocks = _as_blocks(raw, ggml_type, shape)
    layout = _BLOCKS[ggml_type.name]
    integers = np.empty((len(blocks), ggml_type.block_size), np.int8)
    steps = np.empty((len(blocks), layout.num_scales), np.float32)
    lowest = np.empty_like(steps) if layout.has_lowest else None
    for start, some in _chunks(blocks, ggml_type):
        part, end = _integers(some, ggml_type), start + len(some)
        integers[start:end], steps[start:end] = part.integers, part.steps
        if lowest is not None:
            lowest[start:end] = part.lowest
    return BlockTensor(
        layout.bits,
        integers.reshape(shape),
        steps.reshape(shape[0], -1),
        None if lowest is None else lowest.reshape(shape[0], -1),
    )


def stored_form(ggml_type: GgmlType) -> str:
    """Return how a tensor of the type can be kept: a key of FORM_BYTES.

    `read_blocks` reads those that are integers.
    """
    if ggml_type.name in _BLOCKS:
        return f"int{_BLOCKS[ggml_type.name].bits}"
    return {"F16": "fp16", "BF16": "bf16"}.get(ggml_type.name, "fp32")


def _as_blocks(raw: Uint8Array, ggml_type: GgmlType, shape: tuple[int, ...]) -> Uint8Array:
    if ggml_type.name not in SUPPORTED_TYPES:
        raise UnsupportedModelError(unsupported_type(ggml_type))
    num_values = int(np.prod(shape, dtype=np.int64))
    num_blocks = raw.size // ggml_type.block_bytes
    if raw.size % ggml_type.block_bytes or num_blocks * ggml_type.block_size != num_values:
        raise ShapeError(
            f"{raw.size} bytes of {ggml_type.name} are {num_blocks * ggml_type.block_size} values, "
            f"shape {list(shape)} needs {num_values}"
        )
    return np.ascontiguousarray(raw).reshape(num_blocks, ggml_type.block_bytes)


def _chunks(blocks: Uint8Array, ggml_type: GgmlType) -> Iterator[tuple[int, Uint8Array]]:
    """Yield (index of the first, blocks) of some blocks at a time."""
    step = max(1, VALUES_PER_CHUNK // ggml_type.block_size)
    for start in range(0, len(blocks), step):
        yield start, blocks[start : start + step]


def unsupported_type(ggml_type: GgmlType) -> str:
    """Return the message for a type that cannot be dequantised."""
    return (
        f"unsupported: GGUF tensor type {ggml_type.name}; supported: {', '.join(SUPPORTED_TYPES)}; "
        "use a file quantised with one of these"
    )


def _integers(blocks: Uint8Array, ggml_type: GgmlType) -> BlockTensor:
    """Each block as a row."""
    layout = _BLOCKS[ggml_type.name]
    integers = np.empty((len(blocks), ggml_type.block_size), np.int8)
    with np.errstate(all="ignore"):  # a damaged scale may be inf or nan: that is its value
        steps, lowest = layout.fill(blocks, integers)
    return BlockTensor(layout.bits, integers, steps, lowest)


def _half(blocks: Uint8Array, start: int) -> Float32Array:
    """Return the fp16 at byte `start` of every block as fp32, [num_blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _fill_f32(blocks: Uint8Array, out: Float32Array) -> None:
    out[...] = blocks.view("<f4")


def _fill_f16(blocks: Uint8Array, out: Float32Array) -> None:
    out[...] = blocks.view("<f2")


def _fill_bf16(blocks: Uint8Array, out: Float32Array) -> None:
    bits = out.view(np.uint32)
    bits[...] = blocks.view("<u2")
    bits <<= 16


_Scales = tuple[Float32Array, Float32Array | None]
"""Steps and lowest values, each [num_blocks, scales of a block]; None where nothing is added."""


def _fill_q8_0(blocks: Uint8Array, out: Int8Array) -> _Scales:
    """Block: scale fp16, 32 x int8."""
    out[...] = blocks[:, 2:].view(np.int8)
    return _half(blocks, 0), None


def _nibbles(packed: Uint8Array, out: Int8Array) -> None:
    """Write 4-bit values: the low halves of all bytes first, then the high halves."""
    half = packed.shape[-1]
    out[..., :half] = packed & 15
    out[..., half:] = packed >> 4


def _fill_q4_0(blocks: Uint8Array, out: Int8Array) -> _Scales:
    """Block: scale fp16, 32 x 4 bits, offset 8."""
    _nibbles(blocks[:, 2:], out)
    out -= 8
    return _half(blocks, 0), None


def _fill_q4_1(blocks: Uint8Array, out: Int8Array) -> _Scales:
    """Block: scale fp16, minimum fp16, 32 x 4 bits."""
    _nibbles(blocks[:, 4:], out)
    return _half(blocks, 0), _half(blocks, 2)


def _add_fifth_bits(high: Uint8Array, out: Int8Array) -> None:
    """Add 16 where the value's bit in `high` ([num_blocks, 4] bytes, lowest first) is set."""
    bits = np.unpackbits(high, axis=1, bitorder="little")
    bits <<= 4
    out += bits.view(np.int8)


def _fill_q5_0(blocks: Uint8Array, out: Int8Array) -> _Scales:
    """Block: scale fp16, 32 x fifth bit, 32 x 4 bits, offset 16."""
    _nibbles(blocks[:, 6:], out)
    _add_fifth_bits(blocks[:, 2:6], out)
    out -= 16
    return _half(blocks, 0), None


def _fill_q5_1(blocks: Uint8Array, out: Int8Array) -> _Scales:
    """Block: scale fp16, minimum fp16, 32 x fifth bit, 32 x 4 bits."""
    _nibbles(blocks[:, 8:], out)
    _add_fifth_bits(blocks[:, 4:8], out)
    return _half(blocks, 0), _half(blocks, 2)


def _k_scales(blocks: Uint8Array) -> _Scales:
    """Unpack the scales and minima of a Q4_K or Q5_K block: each [num_blocks, 8].

    Bytes 0-1 scale of scales, 2-3 scale of minima, then 12 bytes holding 8 + 8 six-bit integers:
    bytes 0-3 are scales 0-3 and bytes 4-7 minima 0-3 in their low six bits; bytes 8-11 hold the
    low four bits of scales 4-7 (low half) and minima 4-7 (high half), whose top two bits are the
    top two of bytes 0-3 and 4-7.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 2 & 48)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 2 & 48)], axis=1)
    return (
        _half(blocks, 0) * scales.astype(np.float32),
        -(_half(blocks, 2) * minima.astype(np.float32)),
    )


def _fill_q4_k(blocks: Uint8Array, out: Int8Array) -> _Scales:
    """Block of 8 x 32 values: scales (see `_k_scales`), 4 x 32 bytes of two rows of 4 bits each."""
    _nibbles(blocks[:, 16:].reshape(-1, 4, 32), out.reshape(-1, 4, 64))
    return _k_scales(blocks)


def _fill_q5_k(blocks: Uint8Array, out: Int8Array) -> _Scales:
    """As Q4_K, with a fifth bit: bit j of byte i belongs to value i of row j."""
    values = out.reshape(-1, 8, 32)
    _nibbles(blocks[:, 48:].reshape(-1, 4, 32), values.reshape(-1, 4, 64))
    fifth = blocks[:, 16:48]
    for row in range(8):
        values[:, row] += ((fifth >> row & 1) << 4).view(np.int8)
    return _k_scales(blocks)


def _fill_q6_k(blocks: Uint8Array, out: Int8Array) -> _Scales:
    """Block of 2 x 4 x 32 values: low 4 bits, high 2 bits, 16 int8 scales, scale of scales fp16.

    In each half, two runs of 32 bytes hold the low bits of rows 0, 1 (low halves) and 2, 3 (high
    halves), and bits 2r, 2r+1 of 32 bytes are the high bits of row r. Offset 32.
    """
    values = out.reshape(-1, 2, 4, 32)
    _nibbles(blocks[:, :128].reshape(-1, 2, 64), values.reshape(-1, 2, 128))
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    for row in range(4):
        values[:, :, row] += ((high >> (2 * row) & 3) << 4).view(np.int8)
    out -= 32
    return _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


class _BlockLayout(NamedTuple):
    """Of a type of integers: how to read it, bits of an integer, scales of a block."""

    fill: Callable[[Uint8Array, Int8Array], _Scales]
    bits: int
    num_scales: int
    has_lowest: bool


_FLOATS: dict[str, Callable[[Uint8Array, Float32Array], None]] = {
    "F32": _fill_f32,
    "F16": _fill_f16,
    "BF16": _fill_bf16,
}

_BLOCKS = {
    "Q8_0": _BlockLayout(_fill_q8_0, 8, 1, has_lowest=False),
    "Q4_0": _BlockLayout(_fill_q4_0, 4, 1, has_lowest=False),
    "Q4_1": _BlockLayout(_fill_q4_1, 4, 1, has_lowest=True),
    "Q5_0": _BlockLayout(_fill_q5_0, 8, 1, has_lowest=False),
    "Q5_1": _BlockLayout(_fill_q5_1, 8, 1, has_lowest=True),
    "Q4_K": _BlockLayout(_fill_q4_k, 4, 8, has_lowest=True),
    "Q5_K": _BlockLayout(_fill_q5_k, 8, 8, has_lowest=True),
    "Q6_K": _BlockLayout(_fill_q6_k, 8, 16, has_lowest=False),
}

SUPPORTED_TYPES = (*_FLOATS, *_BLOCKS)
"""Names of the types that `dequantize` reads."""
