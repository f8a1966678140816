"""GPU kernels against their twins: on a card, or in Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET=1, which must be set before Triton is imported:
test_triton_interpreter.py runs this file so. It knows no bf16 (its products in bf16 are wrong).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    DEVICE = "cuda"
elif os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE = "cpu"
else:
    pytest.skip("no CUDA device and no interpreter", allow_module_level=True)

from batchwright.errors import ConfigError, ShapeError
from batchwright.kernels.gated_activation.triton import activation, gated_activation
from batchwright.kernels.paged_attention import work_naive
from batchwright.kernels.paged_attention.triton import to_device
from batchwright.kernels.rms_norm.triton import rms_norm
from batchwright.kernels.rotary_kv_write.triton import rotary_kv_write
from benchmarks.gpu.attention_case import (
    AttentionCase,
    largest_difference,
    make_problem,
    relative_error,
)
from benchmarks.gpu.check import (
    ATTENTION_TOLERANCE,
    LSE_TOLERANCE,
    SMALL_ATTENTION,
    Check,
    all_checks,
)

ON_CARD = DEVICE == "cuda"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_CARD
CHECKS = [check for check in all_checks() if check.small or ON_CARD]


# exp of a large number is infinite, and 1 / (1 + it) is 0, as it should be
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
    # the interpreter computes both sides of a tl.where
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    if not ON_CARD:
        torch.set_num_threads(1)  # the twins' products are too small for two


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_equals_twin(check: Check, dtype: torch.dtype) -> None:
    for what, (error, tolerance) in check.run(dtype, DEVICE).items():
        assert error <= tolerance, what


TINY = AttentionCase(
    name="tiny", rows=((40, 1), (3, 2)), num_q_heads=2, num_kv_heads=1, head_dim=16
)


@pytest.mark.parametrize("case", SMALL_ATTENTION, ids=lambda case: case.name)
def test_the_twin_that_reads_work_lists(case: AttentionCase) -> None:
    problem = make_problem(case, torch.float32, "cpu")
    work, _ = problem.plan()
    k_cache, v_cache = problem.k_cache, problem.v_cache
    if problem.scales is not None:
        k_cache, v_cache = (
            cache.float() * scale[..., None]
            for cache, scale in zip((k_cache, v_cache), problem.scales)
        )
    out = torch.full(problem.q.shape, torch.nan)
    lse = torch.full(problem.q.shape[:2], torch.nan)
    work_naive.paged_attention(
        problem.q, k_cache, v_cache, problem.block_table, to_device(work, "cpu"),
        scale=case.head_dim**-0.5, window=case.window, soft_cap=case.soft_cap,
        sinks=problem.sinks, out=out, lse=lse,
    )  # fmt: skip
    right, right_lse = problem.run_twin()
    assert relative_error(out, right) <= ATTENTION_TOLERANCE[torch.float32]
    assert largest_difference(lse, right_lse) <= LSE_TOLERANCE[torch.float32]


def test_a_wrong_position_is_noticed() -> None:
    """Negative control of the tolerances."""
    problem = make_problem(TINY, torch.float32, DEVICE)
    right, right_lse = problem.run_twin()
    problem.positions[0] -= 1
    out, lse = problem.run()
    assert relative_error(out, right) > 100 * ATTENTION_TOLERANCE[torch.float32]
    assert largest_difference(lse, right_lse) > 100 * LSE_TOLERANCE[torch.float32]
    assert relative_error(out[1:], right[1:]) < ATTENTION_TOLERANCE[torch.float32]


@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_without_keys_is_empty(sinks: bool) -> None:
    case = AttentionCase(
        name="", rows=((0, 3),), num_q_heads=2, num_kv_heads=1, head_dim=16, sinks=sinks
    )
    problem = make_problem(case, torch.float32, DEVICE)
    problem.positions[:] = (-1, 0, -1)
    out, lse = (x.cpu() for x in problem.run())
    assert torch.all(out[[0, 2]] == 0)
    empty = problem.sinks.cpu() if problem.sinks is not None else torch.tensor(-torch.inf)
    assert largest_difference(lse[[0, 2]], empty.expand(2, 2)) < 1e-6
    assert out[1].isfinite().all() and lse[1].isfinite().all()


def test_items_of_no_entries_do_nothing() -> None:
    problem = make_problem(TINY, torch.float32, DEVICE)
    work, tiling = problem.plan()
    padded = work._replace(narrow=np.concatenate([work.narrow, np.zeros((3, 8), np.int32)]))
    for found, right in zip(problem.run((padded, tiling)), problem.run((work, tiling))):
        assert torch.equal(found, right)


def test_large_scores_do_not_overflow() -> None:
    problem = make_problem(TINY, torch.float32, DEVICE)
    problem.q *= 1e4
    (out, lse), (right, right_lse) = problem.run(), problem.run_twin()
    torch.testing.assert_close(lse.cpu().double(), right_lse, rtol=1e-5, atol=0)
    # near-ties of scores about 1e5 are decided by rounding
    assert (out.cpu() - right).abs().max() < 0.1


def test_a_nan_query_stays_alone_and_visible() -> None:
    problem = make_problem(TINY, torch.float32, DEVICE)
    clean, clean_lse = problem.run()
    problem.q[1, 0, 3] = torch.nan
    out, lse = problem.run()
    assert out[1, 0].isnan().all() and lse[1, 0].isnan()
    out[1, 0], lse[1, 0] = clean[1, 0], clean_lse[1, 0]
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)


def test_numbers_beyond_fp8_are_cut_and_nan_stays_visible() -> None:
    heads = torch.zeros(2, 1, 16)
    heads[0, 0, :5] = torch.tensor([1e4, -500.0, 448.0, torch.nan, -torch.inf])
    index = torch.arange(2, dtype=torch.int32, device=DEVICE)
    for dtype in (torch.float8_e4m3fn, torch.int8):
        caches = [torch.zeros(1, 1, 16, 16, device=DEVICE).to(dtype) for _ in range(2)]
        scales = [torch.zeros(1, 1, 16, device=DEVICE) for _ in range(2)]
        there = heads.to(DEVICE, copy=True)
        is_int8 = dtype == torch.int8
        rotary_kv_write(
            there, there, there, *caches, index, index, scales=tuple(scales) if is_int8 else None
        )
        for cache, scale in zip(caches, scales, strict=True):
            found = cache.float().cpu()[0, 0] * (scale.cpu()[0, 0, :, None] if is_int8 else 1)
            assert torch.all(found[1] == 0)
            if is_int8:  # the scale tells
                assert found[0].isnan().all()
            else:
                assert found[0, :3].tolist() == [448.0, -448.0, 448.0]
                assert found[0, 4] == -448.0
                assert found[0, 3].isnan() or not ON_CARD  # the interpreter knows no such NaN


def test_disagreeing_tensors_are_refused() -> None:
    problem = make_problem(TINY, torch.float32, DEVICE)
    k_cache = problem.k_cache
    problem.k_cache = k_cache[:, :, :, :8]
    with pytest.raises(ShapeError, match="disagree"):
        problem.run()
    problem.k_cache = k_cache.half()
    with pytest.raises(ShapeError, match="disagree"):
        problem.run()
    problem.k_cache = problem.v_cache = k_cache.to(torch.int8)
    with pytest.raises(ShapeError, match="scales None"):
        problem.run()
    problem.v_cache = k_cache
    problem.k_cache = k_cache.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ShapeError, match="contiguous"):
        problem.run()

    x = torch.zeros(4, 8, device=DEVICE)
    with pytest.raises(ShapeError, match="disagree"):
        rms_norm(x, x[0, :7], 1e-5, x)
    with pytest.raises(ShapeError, match="contiguous"):
        rms_norm(x.T, x[:, 0], 1e-5, x.T)
    with pytest.raises(ShapeError, match="twice as wide"):
        gated_activation(x, "silu", x)
    with pytest.raises(ShapeError, match="disagree"):
        activation(x, "silu", x[:3])
    with pytest.raises(ConfigError, match="activation is 'swish'"):
        activation(x, "swish", x)

    heads, cache = torch.zeros(3, 2, 16, device=DEVICE), torch.zeros(2, 2, 16, 16, device=DEVICE)
    index, table = torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.zeros(9, 8)
    for positions, cos in ((index[:2], table), (index, torch.zeros(9, 9)), (index, None)):
        with pytest.raises(ShapeError, match="disagree"):
            rotary_kv_write(heads, heads, heads, cache, cache, positions, index, cos, table)
    with pytest.raises(ShapeError, match="contiguous"):
        rotary_kv_write(
            heads, heads, heads, cache.transpose(2, 3), cache.transpose(2, 3), index, index
        )
