"""Attention over shared nodes, merged with the rest, against paged attention in fp64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import batchwright.kernels  # noqa: F401
from batchwright.kernels.paged_attention.numba import paged_attention
from batchwright.kernels.paged_attention.plan import loaded_keys, plan_attention
from batchwright.kernels.shared_prefix_attention import naive
from batchwright.kernels.shared_prefix_attention.plan import (
    NodeCost,
    SharedPrefixPlan,
    plan_shared_prefixes,
)
from batchwright.kernels.shared_prefix_attention.products import add_nodes
from tests.kernels.paged_case import Case, Paged, Shape, make_case, page, run_naive

pytestmark = pytest.mark.cpu

TOLERANCE = 1e-5  # fp32 sums over up to 1,000 keys, scores of standard deviation 2
FREE = NodeCost(saved_s_per_flop=1.0, gather_s_per_element=0, merge_s_per_element=0, node_s=0)
"""Every node is taken."""

SHAPES = {
    "smollm2": Shape(),
    "one_group": Shape(num_q_heads=4, num_kv_heads=4, head_dim=64),
    "mqa12": Shape(num_q_heads=12, num_kv_heads=1, head_dim=8),
    "group4_block64": Shape(num_q_heads=8, num_kv_heads=2, head_dim=24, block_size=64),
    "dim60_block96": Shape(num_q_heads=2, num_kv_heads=2, head_dim=60, block_size=96),
    "soft_cap": Shape(soft_cap=2.0, head_dim=16),
}


def random_tree(levels: int, seed: int) -> tuple[list[tuple[int, int]], dict]:
    """Rows of 1-3 query tokens, each with a prefix of an earlier row, `levels` deep at most."""
    rng = np.random.default_rng(seed)
    depths, lengths, parents = [0], [(int(rng.integers(520, 1000)), 1)], {}
    for row in range(1, 12):
        candidates = [i for i, depth in enumerate(depths) if depth < levels]
        parent = int(rng.choice(candidates))
        common = int(rng.integers(0, lengths[parent][0]))
        suffix = int(rng.choice([0, 1, 50, 300]))
        lengths.append((common + suffix, int(rng.integers(1, 4))))
        parents[row] = (parent, common)
        depths.append(depths[parent] + 1)
    return lengths, parents


def plan_case(case: Case, paged: Paged, **changes: object) -> SharedPrefixPlan:
    s = case.shape
    positions = [np.arange(len(k) - len(q), len(k)) for k, q in zip(case.k, case.q)]
    return plan_shared_prefixes(
        np.cumsum([0, *map(len, case.q)]).astype(np.int32),
        paged.slots,
        np.concatenate(positions).astype(np.int32),
        num_q_heads=s.num_q_heads,
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        block_table=paged.block_table,
        block_size=s.block_size,
        **({"cost": FREE, "window": s.window} | changes),  # type: ignore[arg-type]
    )


def run_products(case: Case, paged: Paged, plan: SharedPrefixPlan) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of all query tokens; outputs are NaN beforehand."""
    s, q = case.shape, np.concatenate(case.q)
    out, lse = np.full(q.shape, np.nan, np.float32), np.full(q.shape[:2], np.nan, np.float32)
    arrays = (paged.k_cache, paged.v_cache, paged.block_table)
    scale = s.head_dim**-0.5
    paged_attention(q, *arrays, plan.rest, scale=scale, soft_cap=s.soft_cap, out=out, lse=lse)
    add_nodes(
        torch.from_numpy(q),
        *arrays,
        plan.nodes,
        scale=scale,
        soft_cap=s.soft_cap,
        out=torch.from_numpy(out),
        lse=torch.from_numpy(lse),
    )
    return out, lse


def whole(case: Case, paged: Paged) -> tuple[np.ndarray, np.ndarray]:
    """Plain attention of all query tokens, fp64."""
    outs, lses = zip(*run_naive(case, paged))
    return np.concatenate(outs), np.concatenate(lses)


def assert_close(left: tuple, right: tuple, tolerance: float) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_merged_parts_equal_full_attention(shape: str, levels: int) -> None:
    for seed in range(3):
        lengths, parents = random_tree(levels, seed)
        case = make_case(SHAPES[shape], lengths, seed, parents)
        paged = page(case, seed, share=True)
        plan = plan_case(case, paged)
        assert plan.nodes
        assert_close(run_products(case, paged, plan), whole(case, paged), TOLERANCE)


@pytest.mark.parametrize("shape", ["smollm2", "soft_cap"])
def test_the_naive_twin_equals_full_attention(shape: str) -> None:
    lengths, parents = random_tree(3, 1)
    case = make_case(SHAPES[shape], lengths, 1, parents)
    paged = page(case, share=True)
    plan = plan_case(case, paged)
    assert plan.nodes
    out, lse = naive.shared_prefix_attention(
        torch.from_numpy(np.concatenate(case.q)).double(),
        *(torch.from_numpy(x) for x in (paged.k_cache, paged.v_cache, paged.block_table)),
        plan,
        scale=case.shape.head_dim**-0.5,
        soft_cap=case.shape.soft_cap,
    )
    assert_close((out.numpy(), lse.numpy()), whole(case, paged), 1e-12)


def test_a_missing_node_is_noticed() -> None:
    """Negative control: leaving out one part is an error the comparison must see."""
    lengths, parents = random_tree(2, 0)
    case = make_case(Shape(), lengths, 0, parents)
    paged = page(case, share=True)
    plan = plan_case(case, paged)
    out, _ = run_products(case, paged, plan._replace(nodes=plan.nodes[1:]))
    assert not np.abs(out - whole(case, paged)[0]).max() < 1000 * TOLERANCE


def test_the_order_of_merging_changes_rounding_only() -> None:
    lengths, parents = random_tree(3, 2)
    case = make_case(Shape(), lengths, 2, parents)
    paged = page(case, share=True)
    plan = plan_case(case, paged)
    assert len(plan.nodes) > 2
    backwards = run_products(case, paged, plan._replace(nodes=plan.nodes[::-1]))
    assert_close(run_products(case, paged, plan), backwards, 3e-6)


def two_levels() -> tuple[Case, Paged]:
    """Eight rows over 256 keys, four of them over 256 more; keys of one row end with a node."""
    parents = dict.fromkeys(range(1, 4), (0, 256)) | {4: (0, 512), 5: (4, 512), 6: (4, 512)}
    lengths = [(600, 1), (300, 1), (260, 1), (255, 1), (520, 1), (511, 1), (700, 1)]
    case = make_case(Shape(head_dim=16), lengths, parents=parents)
    return case, page(case, share=True)


def test_nodes_of_two_levels() -> None:
    case, paged = two_levels()
    plan = plan_case(case, paged)
    nodes = {(frozenset(n.tokens.tolist()), n.start, n.end) for n in plan.nodes}
    assert nodes == {(frozenset(range(7)), 0, 256), (frozenset({0, 4, 5, 6}), 256, 512)}
    starts = dict(zip(plan.rest.tokens.tolist(), plan.rest.key_start.tolist()))
    assert starts == dict.fromkeys((0, 4, 5, 6), 512) | dict.fromkeys((1, 2, 3), 256)


def test_keys_are_loaded_once() -> None:
    """Row 3 ends with the root and row 5 with the branch: their suffixes are empty."""
    case, paged = two_levels()
    lengths = [len(k) for k in case.k]
    plan = plan_case(case, paged)
    suffixes = sum(n - (512 if i in (0, 4, 5, 6) else 256) for i, n in enumerate(lengths))
    assert plan.loaded_keys == 256 + 256 + suffixes
    out, lse = run_products(case, paged, plan)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    # without nodes: one item shares the root
    alone = plan_case(case, paged, cost=NodeCost(node_s=1.0))
    assert not alone.nodes
    assert alone.loaded_keys == 256 + sum(n - 256 for n in lengths)
    unshared = plan_attention(
        np.arange(8, dtype=np.int32),
        paged.slots,
        np.array(lengths, np.int32) - 1,
        num_q_heads=9,
        num_kv_heads=3,
    )
    assert loaded_keys(unshared) == sum(lengths)


def test_loaded_keys_of_a_chunk_and_of_windows() -> None:
    cu, slots = np.array([0, 4, 5], np.int32), np.array([0, 1], np.int32)
    positions = np.array([96, 97, 98, 99, 299], np.int32)
    heads = {"num_q_heads": 4, "num_kv_heads": 2}
    assert loaded_keys(plan_attention(cu, slots, positions, **heads)) == 100 + 300
    assert loaded_keys(plan_attention(cu, slots, positions, window=10, **heads)) == 13 + 10


def test_small_nodes_are_left_to_the_paged_kernel() -> None:
    """By the cost rule a node is taken from some number of rows and of keys on."""

    def num_nodes(rows: int, prefix: int, **changes: object) -> int:
        parents = dict.fromkeys(range(1, rows), (0, prefix))
        shape = Shape(num_q_heads=2, num_kv_heads=1, head_dim=8)
        case = make_case(shape, [(prefix + 1, 1)] * rows, parents=parents)
        return len(plan_case(case, page(case, share=True), **changes).nodes)

    # a node of k keys and r rows saves k (64 r - 16) s of 1e-6 and costs 16 r and 1e4 of it
    cost = NodeCost(1e-6, 1e-6, 1e-6, 1e-2)
    dear = cost._replace(node_s=1.5e-2)
    assert num_nodes(2, 128, cost=cost) == 1  # 128 x 112 = 14,336 > 10,032
    assert num_nodes(2, 128, cost=dear) == 0
    assert num_nodes(4, 128, cost=dear) == 1
    assert num_nodes(2, 256, cost=dear) == 1
    assert num_nodes(2, 120, cost=FREE) == 0  # less than a tile
    assert num_nodes(4, 256, cost=FREE, min_tokens=5) == 0


def test_a_row_alone_or_a_window_has_no_nodes() -> None:
    case, paged = two_levels()
    assert not plan_case(case, paged, window=300).nodes
    alone = make_case(Shape(head_dim=16), [(600, 3)])
    assert not plan_case(alone, page(alone)).nodes
    windowed = replace(case.shape, window=700)
    assert not plan_case(replace(case, shape=windowed), paged).nodes
