"""Dequantisation against the `gguf` package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from batchwright.errors import ShapeError, UnsupportedModelError
from batchwright.weights import dequantize as module
from batchwright.weights.dequantize import SUPPORTED_TYPES, dequantize, read_blocks, stored_form
from batchwright.weights.ggml_types import GGML_TYPES

BY_NAME = {ggml_type.name: ggml_type for ggml_type in GGML_TYPES.values()}
SPECIAL_HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00]


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits, except that any nan equals any nan (its payload is the processor's choice)."""
    assert got.shape == want.shape and got.dtype == want.dtype == np.float32
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], want.view(np.uint32)[~nan])


def reference(raw: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.array(gguf.dequantize(raw, gguf.GGMLQuantizationType[name]), np.float32)


def random_rows(name: str, rows: int, blocks_per_row: int, seed: int) -> np.ndarray:
    """Random bytes; every special fp16 value appears at every even byte of some block."""
    ggml_type = BY_NAME[name]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * blocks_per_row, ggml_type.block_bytes), np.uint8)
    for index, half in enumerate(SPECIAL_HALVES * 2):
        position = 2 * (index % (ggml_type.block_bytes // 2))
        for start in {0, min(2, ggml_type.block_bytes - 2), ggml_type.block_bytes - 2, position}:
            raw[(7 * index + start) % len(raw), start : start + 2] = [half & 255, half >> 8]
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", SUPPORTED_TYPES)
def test_random_blocks_equal_the_reference(name: str) -> None:
    rows, blocks_per_row = 37, 5
    raw = random_rows(name, rows, blocks_per_row, seed=1)
    shape = (rows, blocks_per_row * BY_NAME[name].block_size)
    got = dequantize(raw.reshape(-1), BY_NAME[name], shape)
    assert_same_bits(got, reference(raw, name).reshape(shape))


@pytest.mark.parametrize("name", SUPPORTED_TYPES)
def test_chunk_borders_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_rows(name, 11, 3, seed=2).reshape(-1)
    shape = (11, 3 * BY_NAME[name].block_size)
    whole = dequantize(raw, BY_NAME[name], shape)
    monkeypatch.setattr(module, "VALUES_PER_CHUNK", 4 * BY_NAME[name].block_size)
    assert_same_bits(dequantize(raw, BY_NAME[name], shape), whole)


@pytest.mark.parametrize("name", [n for n in SUPPORTED_TYPES if n[0] == "Q"])
def test_integers_with_scales_are_the_same_values(name: str, monkeypatch) -> None:
    monkeypatch.setattr(module, "VALUES_PER_CHUNK", 4 * BY_NAME[name].block_size)
    raw = random_rows(name, 11, 3, seed=5)
    shape = (11, 3 * BY_NAME[name].block_size)
    blocks = read_blocks(raw.reshape(-1), BY_NAME[name], shape)
    assert blocks.shape == shape
    assert stored_form(BY_NAME[name]) == f"int{blocks.bits}"
    assert_same_bits(blocks.dense(), reference(raw, name).reshape(shape))
    if blocks.bits == 4:
        finite = np.isfinite(blocks.steps).all(1)
        from_zero = blocks.from_zero()
        assert set(np.unique(from_zero.integers)) <= set(range(16))
        np.testing.assert_array_equal(from_zero.dense()[finite], blocks.dense()[finite])


@pytest.mark.parametrize("name", [n for n in SUPPORTED_TYPES if not n.endswith("_K")])
def test_quantised_values_come_back_close(name: str) -> None:
    """Against quantisation, not only against another reader of the same bytes."""
    values = np.random.default_rng(3).normal(size=(8, 256)).astype(np.float32)
    raw = gguf.quantize(values, gguf.GGMLQuantizationType[name])
    got = dequantize(raw.view(np.uint8).reshape(-1), BY_NAME[name], values.shape)
    assert np.abs(got - values).max() < {"4": 0.35, "5": 0.2, "8": 0.02}.get(name[1], 0.02)


def test_every_bf16_and_f16_value() -> None:
    raw = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    for name in ("BF16", "F16"):
        assert_same_bits(
            dequantize(raw, BY_NAME[name], (256, 256)), reference(raw.reshape(256, -1), name)
        )


def test_unaligned_and_read_only_input() -> None:
    raw = np.frombuffer(b"x" + random_rows("Q6_K", 4, 1, seed=4).tobytes(), np.uint8)[1:]
    want = reference(raw.reshape(4, -1), "Q6_K")
    got = dequantize(raw, BY_NAME["Q6_K"], (4, 256))
    assert_same_bits(got, want)
    assert got.flags.writeable


def test_unsupported_type_lists_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"IQ2_XS; supported: F32, F16, .*Q6_K"):
        dequantize(np.zeros(74, np.uint8), BY_NAME["IQ2_XS"], (1, 256))


def test_bytes_and_shape_must_agree() -> None:
    with pytest.raises(ShapeError, match="64 values, shape"):
        dequantize(np.zeros(40, np.uint8), BY_NAME["Q4_1"], (1, 32))


def test_type_table_equals_the_specification() -> None:
    table = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    names = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    common = set(table) & set(GGML_TYPES)  # a newer or older `gguf` may know others
    assert len(common) > 30
    for kind in common:
        assert GGML_TYPES[kind] == (names[kind], *table[kind])
