"""The rival by matrix products computes what it is timed for: full attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import batchwright.kernels  # noqa: F401
from batchwright.kernels.paged_attention.numba import paged_attention
from benchmarks.shared_prefix_products import Node, add_nodes, find_nodes
from tests.kernels.paged_case import Case, Paged, Shape, make_case, page, run_naive

pytestmark = pytest.mark.cpu

TOLERANCE = 1e-5  # fp32 sums over up to 1,000 keys, scores of standard deviation 2
SHAPES = {
    "smollm2": Shape(),
    "one_group": Shape(num_q_heads=4, num_kv_heads=4, head_dim=64),
    "mqa_block96": Shape(num_q_heads=12, num_kv_heads=1, head_dim=60, block_size=96),
    "soft_cap": Shape(soft_cap=2.0, head_dim=16),
}


def tree(shape: Shape, levels: int) -> tuple[Case, Paged]:
    """Twelve rows, each with a prefix of an earlier one; some are nothing but that prefix."""
    rng = np.random.default_rng(levels)
    depths, lengths, parents = [0], [900], {}
    for row in range(1, 12):
        parent = int(rng.choice([i for i, depth in enumerate(depths) if depth < levels]))
        common = int(rng.integers(200, lengths[parent]))
        lengths.append(common + int(rng.choice([0, 1, 50, 300])))
        parents[row] = (parent, common)
        depths.append(depths[parent] + 1)
    case = make_case(shape, [(length - 1, 1) for length in lengths], levels, parents)
    return case, page(case, share=True)


def run(case: Case, paged: Paged, skip: int = 0, step: int = 1) -> tuple[list[Node], np.ndarray]:
    """(nodes, out and lse of all rows side by side); `skip` leaves out nodes."""
    s, q = case.shape, np.concatenate(case.q)
    nodes, rest = find_nodes(
        paged.slots,
        np.array([len(k) - 1 for k in case.k], np.int32),
        num_q_heads=s.num_q_heads,
        num_kv_heads=s.num_kv_heads,
        block_table=paged.block_table,
        block_size=s.block_size,
        min_rows=2,
    )
    out, lse = np.full(q.shape, np.nan, np.float32), np.full(q.shape[:2], np.nan, np.float32)
    arrays = (paged.k_cache, paged.v_cache, paged.block_table)
    options = {"scale": s.head_dim**-0.5, "soft_cap": s.soft_cap}
    paged_attention(q, *arrays, rest, **options, out=out, lse=lse)
    tensors = [torch.from_numpy(x) for x in (q, out, lse)]
    add_nodes(tensors[0], *arrays, nodes[skip:][::step], **options, out=tensors[1], lse=tensors[2])
    return nodes, np.concatenate([out, lse[..., None]], 2)


def whole(case: Case, paged: Paged) -> np.ndarray:
    """The same of plain attention in fp64."""
    outs, lses = zip(*run_naive(case, paged))
    return np.concatenate([np.concatenate(outs), np.concatenate(lses)[..., None]], 2)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_merged_parts_equal_full_attention(shape: str, levels: int) -> None:
    case, paged = tree(SHAPES[shape], levels)
    nodes, found = run(case, paged)
    assert len(nodes) > 1
    np.testing.assert_allclose(found, whole(case, paged), rtol=0, atol=TOLERANCE)
    _, backwards = run(case, paged, step=-1)  # in which order parts are merged is rounding
    np.testing.assert_allclose(found, backwards, rtol=0, atol=3e-6)


def test_a_missing_node_is_noticed() -> None:
    """Negative control."""
    case, paged = tree(SHAPES["smollm2"], 2)
    _, found = run(case, paged, skip=1)
    assert not np.abs(found - whole(case, paged)).max() < 1000 * TOLERANCE
