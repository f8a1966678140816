"""int8 keys and values: written as the twin says, and attended to as the numbers they stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from batchwright.errors import ShapeError
from batchwright.kernels.paged_attention.layout import cache_shapes, scales_of
from batchwright.kernels.rotary_kv_write import naive
from batchwright.kernels.rotary_kv_write.numba import rotary_kv_write
from tests.kernels.paged_case import (
    Case,
    Paged,
    Shape,
    make_case,
    page,
    run_naive,
    run_step,
    run_whole,
)
from tests.kernels.test_paged_attention import (
    FEW,
    LENGTHS,
    SHAPES,
    assert_same_bits,
    largest_error,
    parallel_at_any_size,  # noqa: F401  a fixture
)

pytestmark = pytest.mark.cpu


def narrow_and_wide(paged: Paged) -> tuple[Paged, Paged]:
    """The caches in int8, and in fp32 what these stand for.

    Places that nobody has written, which are NaN, have numbers and scales that are NaN.
    """
    num_blocks, num_kv_heads, head_dim, block_size = paged.k_cache.shape
    shapes = cache_shapes(num_blocks, num_kv_heads, head_dim, block_size, has_scales=True)
    k_cache, v_cache = (np.full(shape, 77, np.int8) for shape in shapes)
    scales = scales_of(k_cache)
    wide = []
    for which, (fp32, to) in enumerate(
        ((paged.k_cache.swapaxes(2, 3), k_cache[:, :, :head_dim].swapaxes(2, 3)),
         (paged.v_cache, v_cache))
    ):  # fmt: skip
        numbers, scale = naive.stored(
            torch.from_numpy(fp32[..., :head_dim]).nan_to_num(), torch.int8
        )
        unwritten = np.isnan(fp32[..., :head_dim]).any(-1)
        scales[:, :, which] = np.where(unwritten, np.nan, scale.numpy())
        to[..., :head_dim] = numbers.numpy()
        wide.append(numbers.numpy() * scales[:, :, which, :, None])
    keys = np.ascontiguousarray(wide[0].swapaxes(2, 3))
    values = np.full(paged.v_cache.shape, np.nan, np.float32)
    values[..., :head_dim] = wide[1]
    return (
        replace(paged, k_cache=k_cache, v_cache=v_cache),
        replace(paged, k_cache=keys, v_cache=values),
    )


@pytest.mark.parametrize("name", SHAPES)
def test_equals_fp64_twin_of_what_they_stand_for(name: str) -> None:
    case = make_case(SHAPES[name], LENGTHS)
    narrow, wide = narrow_and_wide(page(case))
    assert largest_error(run_whole(case, narrow), run_naive(case, wide)) < 2e-5


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_scale_is_noticed(which: int) -> None:
    """Negative control."""
    case = make_case(Shape(head_dim=16), [(90, 40)])
    narrow, wide = narrow_and_wide(page(case))
    scales_of(narrow.k_cache)[:, :, which] *= 1.01
    assert largest_error(run_whole(case, narrow), run_naive(case, wide)) > 1e-3


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_chunking_and_neighbours_change_no_bit(name: str, chunk: int) -> None:
    case: Case = make_case(SHAPES[name], [(40, 66), (0, 1), (230, 40), (3, 70)])
    narrow, _ = narrow_and_wide(page(case))
    whole = run_whole(case, narrow)
    for row, (out, lse) in enumerate(whole):
        parts = [
            run_step(case, narrow, [(row, start, min(start + chunk, len(out)))])[0]
            for start in range(0, len(out), chunk)
        ]
        alone = [(np.concatenate([o for o, _ in parts]), np.concatenate([x for _, x in parts]))]
        assert_same_bits([(out, lse)], alone)


@pytest.mark.parametrize(("num_kv_heads", "head_dim", "block_size"), [(2, 20, 32), (3, 64, 96)])
def test_what_is_written_is_what_the_twin_says(num_kv_heads, head_dim, block_size) -> None:
    rng = np.random.default_rng(0)
    shape = 100, num_kv_heads, head_dim
    k, v = (
        rng.standard_normal(shape).astype(np.float32)
        * np.geomspace(1e-3, 1e3, head_dim, dtype=np.float32)
        for _ in range(2)
    )
    k[3, 1], v[4, 0] = 0.0, 0.0
    k[5, 0] = np.where(np.arange(head_dim) == 7, 1e4, k[5, 0])  # an outlier takes all steps
    shapes = cache_shapes(5, num_kv_heads, head_dim, block_size, has_scales=True)
    k_cache, v_cache = (np.full(one, 55, np.int8) for one in shapes)
    slots = rng.permutation(5 * block_size)[:100].astype(np.int32)
    slots[9] = -1
    rotary_kv_write(k.copy(), k, v, k_cache, v_cache, np.arange(100, dtype=np.int32), slots)
    scales = scales_of(k_cache)
    written = slots[slots >= 0]
    assert (k_cache.reshape(5, num_kv_heads, -1)[:, :, : head_dim * block_size] == 55).any()
    for which, x in enumerate((k, v)):
        numbers, scale = naive.stored(torch.from_numpy(x), torch.int8)
        for token, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            block, offset = divmod(slot, block_size)
            found = (
                k_cache[block, :, :head_dim, offset]
                if not which
                else v_cache[block, :, offset, :head_dim]
            )
            np.testing.assert_array_equal(found, numbers[token].numpy())
            np.testing.assert_array_equal(scales[block, :, which, offset], scale[token].numpy())
    others = np.setdiff1d(np.arange(5 * block_size), written)
    untouched = v_cache[others // block_size, :, others % block_size]
    assert (untouched == 55).all(), "written beside its place"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_by_whoever_reads_it(value: float) -> None:
    k = np.ones((2, 1, 16), np.float32)
    k[1, 0, 3] = value
    shapes = cache_shapes(1, 1, 16, 32, has_scales=True)
    k_cache, v_cache = (np.zeros(one, np.int8) for one in shapes)
    at = np.arange(2, dtype=np.int32)
    rotary_kv_write(k.copy(), k, k, k_cache, v_cache, at, at)
    scales = scales_of(k_cache)[0, 0]
    assert np.isfinite(scales[:, 0]).all() and not np.isfinite(scales[:, 1]).any()


def test_caches_without_scales_are_refused() -> None:
    case = make_case(Shape(head_dim=16), [(5, 2)])
    paged = page(case)
    bare = replace(
        paged,
        k_cache=np.zeros(paged.k_cache.shape, np.int8),
        v_cache=np.zeros(paged.v_cache.shape, np.int8),
    )
    with pytest.raises(ShapeError, match="disagree"):
        run_whole(case, bare)
