"""Rotary embedding and KV write: equal to the torch twin and to transformers, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchwright import kernels
from batchwright.errors import ShapeError
from batchwright.kernels.paged_attention.layout import cache_shapes
from batchwright.kernels.rotary_kv_write import naive
from batchwright.kernels.rotary_kv_write import numba as kernel
from batchwright.kernels.rotary_kv_write.numba import rotary_kv_write

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def parallel_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_ELEMENTS_PER_THREAD", 1)


NUM_BLOCKS, MAX_POSITIONS = 9, 200


class Problem:
    """A step of 77 tokens in a merged qkv array, one of them not to be written."""

    def __init__(self, head_dim: int, rotary_dim: int, block_size: int = 32, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.heads, self.head_dim, self.block_size = (6, 2), head_dim, block_size
        self.qkv = rng.standard_normal((77, 10 * head_dim)).astype(np.float32)
        angles = rng.uniform(0, 6, (MAX_POSITIONS, rotary_dim // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.positions = rng.integers(0, MAX_POSITIONS, 77).astype(np.int32)
        self.slots = rng.permutation(NUM_BLOCKS * block_size)[:77].astype(np.int32)
        self.slots[5] = -1

    def run(self, write, parts: list[slice], convert=lambda x: x, **options):
        """(qkv, k_cache, v_cache) after writing the tokens of `parts`, each in one call."""
        shapes = cache_shapes(NUM_BLOCKS, 2, self.head_dim, self.block_size)
        k_cache, v_cache = (np.full(shape, np.nan, np.float32) for shape in shapes)
        qkv = self.qkv.copy()
        d = self.head_dim
        q, k, v = (x.reshape(77, -1, d) for x in np.split(qkv, [6 * d, 8 * d], axis=1))
        assert q.base is not None
        tables = (self.cos, self.sin) if self.cos.size else ()
        for part in parts:
            arrays = (q[part], k[part], v[part], k_cache, v_cache)
            more = (self.positions[part], self.slots[part], *tables)
            write(*map(convert, arrays), *map(convert, more), **options)
        return q, k, v, k_cache, v_cache


ALL = [slice(0, 77)]


def assert_same(left: tuple, right: tuple) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "head_dim, rotary_dim", [(64, 64), (64, 16), (12, 12), (80, 32), (60, 60), (128, 128), (8, 0)]
)
def test_equals_torch_twin_bit_for_bit(head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    problem = Problem(head_dim, rotary_dim)
    fast = problem.run(rotary_kv_write, ALL, interleaved=interleaved)
    slow = problem.run(naive.rotary_kv_write, ALL, torch.from_numpy, interleaved=interleaved)
    assert_same(fast, slow)
    assert np.isnan(fast[3]).any()  # blocks that no slot names stay untouched


def test_equals_transformers_bit_for_bit() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    problem = Problem(64, 64)
    q, _, _, k_cache, v_cache = problem.run(rotary_kv_write, ALL)
    cos, sin = (
        torch.from_numpy(np.concatenate([t, t], axis=1)[problem.positions])[None]
        for t in (problem.cos, problem.sin)
    )
    before = torch.from_numpy(problem.qkv.reshape(77, 10, 64))[None].transpose(1, 2)
    hf_q, hf_k = apply_rotary_pos_emb(before[:, :6], before[:, 6:8], cos, sin)
    np.testing.assert_array_equal(q, hf_q[0].transpose(0, 1).numpy())
    for token, slot in enumerate(problem.slots):
        if slot >= 0:
            np.testing.assert_array_equal(k_cache[slot // 32, :, :, slot % 32], hf_k[0, :, token])
            np.testing.assert_array_equal(v_cache[slot // 32, :, slot % 32], before[0, 8:, token])


@pytest.mark.parametrize("block_size", [32, 64])
def test_batch_and_threads_change_no_bit(block_size: int) -> None:
    problem = Problem(60, 44, block_size)
    whole = problem.run(rotary_kv_write, ALL)
    for size in (1, 7, 32):
        parts = [slice(a, min(a + size, 77)) for a in range(0, 77, size)]
        assert_same(whole, problem.run(rotary_kv_write, parts))
    before = kernels.get_num_threads()
    kernels.set_num_threads(1)
    one_thread = problem.run(rotary_kv_write, ALL)
    kernels.set_num_threads(before)
    assert_same(whole, one_thread)


def test_wrong_position_or_style_is_noticed() -> None:
    """Negative control."""
    problem = Problem(64, 64)
    right = problem.run(rotary_kv_write, ALL)
    other_style = problem.run(rotary_kv_write, ALL, interleaved=True)
    problem.positions = (problem.positions + 1) % MAX_POSITIONS
    shifted = problem.run(rotary_kv_write, ALL)
    for wrong in (other_style, shifted):
        assert np.abs(wrong[0] - right[0]).max() > 0.1
        assert np.nanmax(np.abs(wrong[3] - right[3])) > 0.1


def test_bad_arrays_are_refused() -> None:
    problem = Problem(64, 64)
    problem.cos = problem.cos[:, :-1]
    with pytest.raises(ShapeError, match="disagree"):
        problem.run(rotary_kv_write, ALL)
    problem = Problem(16, 64)
    with pytest.raises(ShapeError, match="disagree"):
        problem.run(rotary_kv_write, ALL)


def test_eight_bit_numbers_are_near_those_stored() -> None:
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -3, 2, 64
    )
    kept, scale = naive.stored(x, torch.int8)
    assert scale is not None and scale.shape == (50, 3)
    assert ((kept * scale[..., None] - x).abs() <= 0.501 * scale[..., None]).all()
    kept, scale = naive.stored(x.clamp(-400, 400), torch.float8_e4m3fn)
    assert scale is None
    assert ((kept.float() - x).abs() <= x.abs() / 16 + 2**-10).all()
    far = torch.tensor([[500.0, -torch.inf, torch.nan]])
    kept, _ = naive.stored(far, torch.float8_e4m3fn)
    assert kept.float()[0, :2].tolist() == [448.0, -448.0] and kept.float()[0, 2].isnan()
    zeros, scale = naive.stored(torch.zeros(2, 4), torch.int8)
    assert scale is not None and not zeros.any() and not scale.any()
    assert naive.stored(x, torch.float16)[1] is None


def test_bf16_keys_and_values_are_rounded_to_nearest() -> None:
    """As torch rounds them; ties, infinities, NaN and subnormal numbers too."""
    problem = Problem(64, 64)
    special = np.array([np.inf, -np.inf, np.nan, 1e-40, 3.4e38, 0.0, -0.0], np.float32)
    ties = (np.arange(1, 58, dtype=np.uint32) << 15 | 0x3F800000).view(np.float32)
    problem.qkv[0, -64:] = np.concatenate([special, ties])
    *_, k_wide, v_wide = problem.run(rotary_kv_write, ALL)

    def write(q, k, v, k_cache, v_cache, *more, **options):  # type: ignore[no-untyped-def]
        narrow = [np.full(one.shape, 0x7FC0, np.uint16) for one in (k_cache, v_cache)]
        rotary_kv_write(q, k, v, *narrow, *more, **options)
        for cache, bits in zip((k_cache, v_cache), narrow, strict=True):
            cache[...] = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()

    *_, k_narrow, v_narrow = problem.run(write, ALL)
    for narrow, wide in ((k_narrow, k_wide), (v_narrow, v_wide)):
        right = torch.from_numpy(wide).bfloat16().float().numpy()
        np.testing.assert_array_equal(narrow, right)
