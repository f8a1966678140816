"""Paged attention: fast kernel against its fp64 twin and torch, and bit-identity in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch

import batchwright.kernels  # noqa: F401
from batchwright import kernels
from batchwright.errors import ConfigError, ShapeError
from batchwright.kernels.paged_attention import numba as kernel
from batchwright.kernels.paged_attention import plan as plan_module
from batchwright.kernels.paged_attention.layout import cache_shapes
from batchwright.kernels.paged_attention.naive import merge_attention
from batchwright.kernels.paged_attention.numba import paged_attention
from batchwright.kernels.paged_attention.plan import (
    ALL_KEYS,
    AttentionPlan,
    distinct_keys,
    loaded_keys,
    plan_attention,
)
from tests.kernels.paged_case import Case, Shape, make_case, page, run_naive, run_step, run_whole

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def parallel_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SMALL_WORK", 0)


# fp32 sums over up to 800 keys of unit-normal data with scores of standard deviation 2.
TOLERANCE = 1e-5
LENGTHS = [(0, 1), (0, 5), (31, 1), (32, 1), (127, 2), (128, 1), (7, 33), (200, 70), (700, 1)]
SHAPES = {
    "smollm2": Shape(),
    "one_group": Shape(num_q_heads=4, num_kv_heads=4, head_dim=64),
    "mqa48": Shape(num_q_heads=48, num_kv_heads=1, head_dim=128),
    "mqa50": Shape(num_q_heads=50, num_kv_heads=1, head_dim=8),
    "group8": Shape(num_q_heads=8, num_kv_heads=1, head_dim=96),
    "group4_block64": Shape(num_q_heads=8, num_kv_heads=2, head_dim=24, block_size=64),
    "dim12": Shape(num_q_heads=6, num_kv_heads=2, head_dim=12),
    "dim16": Shape(num_q_heads=5, num_kv_heads=1, head_dim=16),
    "dim60": Shape(num_q_heads=2, num_kv_heads=2, head_dim=60),
    "dim80": Shape(num_q_heads=3, num_kv_heads=3, head_dim=80, block_size=96),
    "dim256": Shape(num_q_heads=4, num_kv_heads=1, head_dim=256, block_size=128),
    "window1": Shape(window=1),
    "window37": Shape(window=37, head_dim=16),
    "window128": Shape(window=128, head_dim=16, block_size=64),
    "window150": Shape(window=150, head_dim=16),
    "soft_cap": Shape(soft_cap=2.0, head_dim=16),
    "sinks": Shape(sinks=True, head_dim=16),
    "everything": Shape(sinks=True, soft_cap=3.0, window=70, head_dim=16),
}
FEW = ["smollm2", "one_group", "mqa50", "dim60", "window37", "window150", "everything"]


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(SHAPES[request.param], LENGTHS)


@pytest.fixture(params=FEW)
def small_case(request: pytest.FixtureRequest) -> Case:
    return make_case(SHAPES[request.param], [(40, 66), (0, 1), (230, 40), (3, 70)])


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = kernels.get_num_threads()
    yield
    kernels.set_num_threads(before)


def assert_same_bits(left: list, right: list) -> None:
    for (out_a, lse_a), (out_b, lse_b) in zip(left, right, strict=True):
        np.testing.assert_array_equal(out_a.view(np.int32), out_b.view(np.int32))
        np.testing.assert_array_equal(lse_a.view(np.int32), lse_b.view(np.int32))


def largest_error(left: list, right: list) -> float:
    """Largest difference of any output or lse; NaN if either has one."""
    errors = [np.abs(a - b).max() for x, y in zip(left, right) for a, b in zip(x, y)]
    return float(np.max(errors))


def test_equals_fp64_twin(case: Case) -> None:
    paged = page(case)
    assert largest_error(run_whole(case, paged), run_naive(case, paged)) < TOLERANCE


def test_naive_equals_torch_attention() -> None:
    case = make_case(Shape(num_q_heads=8, num_kv_heads=2, head_dim=24), [(50, 14)])
    ((out, _),) = run_naive(case, page(case))
    q, k, v = (
        torch.from_numpy(x[0]).double().transpose(0, 1)[None] for x in (case.q, case.k, case.v)
    )
    mask = torch.ones(14, 64, dtype=torch.bool).tril(50)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )
    np.testing.assert_allclose(out, expected[0].transpose(0, 1).numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change", [{"window": 36}, {"window": 38}, {"soft_cap": 2.9}], ids=lambda c: str(c)
)
def test_wrong_mask_or_cap_is_noticed(change: dict) -> None:
    """Negative control: an error the comparison must see."""
    case = make_case(Shape(window=37, soft_cap=3.0, head_dim=16), [(90, 40)])
    every_block = page(make_case(Shape(soft_cap=3.0, head_dim=16), [(90, 40)]))
    right = run_naive(case, every_block)
    assert largest_error(run_whole(case, every_block), right) < TOLERANCE
    wrong = run_step(case, every_block, [(0, 0, 40)], **change)
    assert largest_error(wrong, right) > 100 * TOLERANCE


def test_causal_mask_off_by_one_is_noticed() -> None:
    """Negative control: one key more than a query may see."""
    case = make_case(Shape(head_dim=16), [(90, 40)])
    paged = page(case)
    right = run_naive(case, paged)
    shifted = make_case(Shape(head_dim=16), [(90, 40)])
    shifted.q[0] = np.roll(case.q[0], -1, axis=0)  # query t + 1 sits at position t
    wrong = run_whole(shifted, paged)
    assert largest_error(
        [(x[:-1], y[:-1]) for x, y in wrong], [(x[1:], y[1:]) for x, y in right]
    ) > (100 * TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_chunking_changes_no_bit(small_case: Case, chunk: int) -> None:
    paged = page(small_case)
    whole = run_whole(small_case, paged)
    pieces = []
    for i, q in enumerate(small_case.q):
        steps = [
            run_step(small_case, paged, [(i, a, min(a + chunk, len(q)))])[0]
            for a in range(0, len(q), chunk)
        ]
        pieces.append(tuple(np.concatenate(part) for part in zip(*steps)))
    assert_same_bits(whole, pieces)


def test_neighbours_and_order_change_no_bit(small_case: Case) -> None:
    paged = page(small_case)
    whole = run_whole(small_case, paged)
    order = [2, 0, 3, 1]
    rows = [(i, 0, len(small_case.q[i])) for i in order]
    permuted = run_step(small_case, paged, rows)
    assert_same_bits([whole[i] for i in order], permuted)
    alone = [run_step(small_case, paged, [row])[0] for row in rows]
    assert_same_bits(permuted, alone)


def test_block_ids_and_slots_change_no_bit(small_case: Case) -> None:
    first = run_whole(small_case, page(small_case, seed=0))
    assert_same_bits(first, run_whole(small_case, page(small_case, seed=1)))


# A tree of prompts: 0 is the root; 1-3 share 300 keys with it, 4-5 share 500 with 3; 6 shares less
# than a block, 7 has many queries, 8 is as long as what it shares, 9 shares nothing.
TREE = {1: (0, 300), 2: (0, 300), 3: (0, 300), 4: (3, 500), 5: (3, 500), 6: (0, 20), 7: (0, 256)}
TREE |= {8: (0, 288)}
TREE_LENGTHS = [(310, 1), (330, 1), (300, 2), (700, 1), (511, 1), (600, 3), (40, 1), (290, 40)]
TREE_LENGTHS += [(287, 1), (400, 1)]


@pytest.mark.parametrize("shape", ["smollm2", "one_group", "mqa50", "dim60", "sinks", "soft_cap"])
def test_shared_blocks_change_no_bit(shape: str) -> None:
    case = make_case(SHAPES[shape], TREE_LENGTHS, parents=TREE)
    own, shared = page(case), page(case, share=True)
    assert largest_error(run_whole(case, shared), run_naive(case, shared)) < TOLERANCE
    assert_same_bits(run_whole(case, own), run_whole(case, shared))


def segments_of(plan: AttentionPlan) -> set[tuple[frozenset[int], int, int]]:
    """(query tokens, first key, end key) of each segment of the first head's items."""
    return {
        (frozenset(plan.tokens[a:b].tolist()), first, end)
        for head, _, _, begin, stop in plan.items.tolist()
        for a, b, first, end in plan.segments[begin:stop].tolist()
        if head == 0
    }


def test_items_share_every_node_of_the_tree() -> None:
    """Two branches of four rows each under one root, in mixed order, and a stranger."""
    parents = {1: (0, 140), 2: (0, 530), 3: (1, 530), 4: (0, 530), 5: (1, 530), 6: (0, 530)}
    parents |= {7: (1, 530)}
    case = make_case(Shape(head_dim=8), [(540, 1)] * 8 + [(540, 2)], parents=parents)
    paged = page(case, share=True)
    cu = np.array([*range(9), 10], np.int32)
    positions = np.array([540] * 9 + [541], np.int32)
    plan = plan_attention(
        cu, paged.slots, positions, num_q_heads=9, num_kv_heads=3,
        block_table=paged.block_table, block_size=32,
    )  # fmt: skip
    assert sorted(plan.tokens) == list(range(10))
    rows = np.searchsorted(cu, plan.tokens, side="right") - 1
    np.testing.assert_array_equal(plan.slots, paged.slots[rows])
    np.testing.assert_array_equal(plan.key_end, positions[plan.tokens] + 1)
    assert len(plan.items) == 2 * 3
    nodes = {
        (frozenset(range(8)), 0, 128),  # the first 140 keys hold one whole tile
        (frozenset({0, 2, 4, 6}), 128, 512),
        (frozenset({1, 3, 5, 7}), 128, 512),
    }
    own = {(frozenset({i}), 512, ALL_KEYS) for i in range(8)}
    assert segments_of(plan) == nodes | own | {(frozenset({8, 9}), 0, ALL_KEYS)}
    assert loaded_keys(plan) == 128 + 2 * 384 + 8 * (541 - 512) + 542


def test_items_are_cut_where_rows_share_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve rows in branches of three, eight fit: two items of six, no branch is cut."""
    monkeypatch.setattr(plan_module, "_tokens_per_item", lambda *_: 8)
    parents = dict.fromkeys((3, 6, 9), (0, 256))
    parents |= {i + j: (i, 512) for i in (0, 3, 6, 9) for j in (1, 2)}
    case = make_case(Shape(head_dim=8), [(520, 1)] * 12, parents=parents)
    paged = page(case, share=True)
    plan = plan_attention(
        np.arange(13, dtype=np.int32), paged.slots, np.full(12, 520, np.int32),
        num_q_heads=9, num_kv_heads=3, block_table=paged.block_table, block_size=32,
    )  # fmt: skip
    assert (plan.items[:, 2] - plan.items[:, 1]).tolist() == [6] * 6
    assert loaded_keys(plan) == 2 * 256 + 4 * 256 + 12 * 9
    assert_same_bits(run_whole(case, page(case)), run_whole(case, paged))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_random_trees_load_shared_keys_once_and_change_no_bit(
    levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys loaded are those of the tree's nodes, in whole tiles, and of the suffixes: each once."""
    monkeypatch.setattr(plan_module, "_tokens_per_item", lambda *_: 32)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        depths, lengths, parents = [0], [(int(rng.integers(520, 1000)), 1)], {}
        for row in range(1, 10):
            parent = int(rng.choice([i for i, depth in enumerate(depths) if depth < levels]))
            common = int(rng.integers(0, lengths[parent][0]))
            lengths.append((common + int(rng.choice([0, 1, 50, 300])), int(rng.integers(1, 3))))
            parents[row] = (parent, common)
            depths.append(depths[parent] + 1)
        case = make_case(Shape(num_q_heads=2, num_kv_heads=1, head_dim=8), lengths, seed, parents)
        paged = page(case, seed, share=True)
        positions = [np.arange(len(k) - len(q), len(k)) for k, q in zip(case.k, case.q)]
        where = (
            np.cumsum([0, *map(len, case.q)]).astype(np.int32),
            paged.slots,
            np.concatenate(positions).astype(np.int32),
        )
        blocks = {"block_table": paged.block_table, "block_size": 32}
        plan = plan_attention(*where, num_q_heads=2, num_kv_heads=1, **blocks)
        # a tile of keys is known by its blocks; a row's last queries are not before all of a tile
        tiles = set()
        for k, q, slot in zip(case.k, case.q, paged.slots, strict=True):
            for end in range(128, len(k) - len(q) + 2, 128):
                tiles.add(tuple(paged.block_table[slot, : end // 32].tolist()))
        tails = sum(len(k) - (len(k) - len(q) + 1) // 128 * 128 for k, q in zip(case.k, case.q))
        assert any(len(tokens) > 2 for tokens, _, _ in segments_of(plan))
        assert loaded_keys(plan) == distinct_keys(*where, **blocks) == 128 * len(tiles) + tails
        assert_same_bits(run_whole(case, page(case, seed)), run_whole(case, paged))


@pytest.mark.parametrize(("threads", "tokens"), [(1, 32), (2, 24), (64, 8)])
def test_wide_trees_fill_items(monkeypatch: pytest.MonkeyPatch, threads: int, tokens: int) -> None:
    """64 rows over one prompt: large items that share it whole, but some for every thread."""
    monkeypatch.setattr(plan_module, "get_num_threads", lambda: threads)
    parents = dict.fromkeys(range(1, 64), (0, 256))
    case = make_case(Shape(head_dim=8), [(260, 1)] * 64, parents=parents)
    shared = page(case, share=True)
    plan = plan_attention(
        np.arange(65, dtype=np.int32), shared.slots, np.full(64, 260, np.int32),
        num_q_heads=9, num_kv_heads=3, block_table=shared.block_table, block_size=32,
    )  # fmt: skip
    assert len(plan.items) == -(-64 // tokens) * 3
    assert (plan.items[:, 2] - plan.items[:, 1]).max() == tokens
    assert loaded_keys(plan) == -(-64 // tokens) * 256 + 64 * 5
    assert_same_bits(run_whole(case, page(case)), run_whole(case, shared))


def test_block_size_changes_no_bit() -> None:
    cases = [make_case(Shape(block_size=size, head_dim=24), [(140, 30)]) for size in (32, 64, 96)]
    first, *others = [run_whole(case, page(case)) for case in cases]
    for other in others:
        assert_same_bits(first, other)


def test_a_small_step_wakes_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(Shape(head_dim=16), [(3, 2)])
    paged = page(case)
    parallel = run_whole(case, paged)
    monkeypatch.setattr(kernel, "_SMALL_WORK", 10**9)
    assert_same_bits(parallel, run_whole(case, paged))


@pytest.mark.usefixtures("restore_threads")
def test_threads_change_no_bit(small_case: Case) -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    paged = page(small_case)
    kernels.set_num_threads(1)
    one = run_whole(small_case, paged)
    kernels.set_num_threads(2)
    for _ in range(5):
        assert_same_bits(one, run_whole(small_case, paged))


def test_a_later_infinite_value_reaches_no_earlier_query() -> None:
    """A weight of zero times inf would be NaN: masked values must not be read at all."""
    case = make_case(Shape(head_dim=16), [(20, 40)])
    clean = run_whole(case, page(case))
    case.k[0][50:], case.v[0][50:] = np.nan, np.inf
    dirty = run_whole(case, page(case))
    assert_same_bits([(x[:30], y[:30]) for x, y in clean], [(x[:30], y[:30]) for x, y in dirty])
    assert not np.isfinite(dirty[0][0][30:]).any()


def test_a_nan_query_stays_alone_and_visible() -> None:
    case = make_case(Shape(head_dim=16), [(20, 10)])
    clean = run_whole(case, page(case))
    case.q[0][4, 5, 3] = np.nan
    ((out, lse),) = run_whole(case, page(case))
    assert np.isnan(out[4, 5]).all() and np.isnan(lse[4, 5])
    out[4, 5], lse[4, 5] = clean[0][0][4, 5], clean[0][1][4, 5]
    assert_same_bits(clean, [(out, lse)])


def test_large_scores_do_not_overflow() -> None:
    case = make_case(Shape(head_dim=64), [(300, 20)])
    case.q[0] *= 1e4
    paged = page(case)
    (out, lse), (right, right_lse) = run_whole(case, paged)[0], run_naive(case, paged)[0]
    np.testing.assert_allclose(lse, right_lse, rtol=1e-5)
    assert np.abs(out - right).max() < 0.1  # near-ties of scores about 1e5 are decided by rounding
    assert np.abs(out - right).mean() < 1e-3


@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_without_keys_is_empty(sinks: bool) -> None:
    shape = Shape(head_dim=16, sinks=sinks)
    case = make_case(shape, [(0, 3)])
    paged = page(case)
    plan = plan_attention(
        np.array([0, 3], np.int32),
        paged.slots,
        np.array([-1, 0, -1], np.int32),
        num_q_heads=9,
        num_kv_heads=3,
    )
    out, lse = np.full((3, 9, 16), np.nan, np.float32), np.full((3, 9), np.nan, np.float32)
    paged_attention(
        case.q[0], paged.k_cache, paged.v_cache, paged.block_table, plan,
        scale=1.0, sinks=case.sinks, out=out, lse=lse,
    )  # fmt: skip
    assert np.all(out[[0, 2]] == 0)
    np.testing.assert_allclose(
        lse[[0, 2]], np.broadcast_to(case.sinks if sinks else -np.inf, (2, 9)), rtol=1e-6
    )
    assert np.isfinite(out[1]).all() and np.isfinite(lse[1]).all()


def test_an_empty_step_does_nothing() -> None:
    case = make_case(Shape(head_dim=16), [(5, 1)])
    assert run_step(case, page(case), [(0, 1, 1)])[0][0].shape == (0, 9, 16)


def test_merged_parts_equal_the_whole() -> None:
    """Attention over keys [0, 64) and [64, ..) merges into attention over all; sinks count once."""
    case = make_case(Shape(head_dim=16, sinks=True), [(70, 8)])
    paged = page(case)
    ((out, lse),) = run_naive(case, paged)
    positions = torch.arange(70, 78, dtype=torch.int32).numpy()
    cu = np.array([0, 8], np.int32)
    plan = plan_attention(cu, paged.slots, positions, num_q_heads=9, num_kv_heads=3)
    parts = []
    for part, sinks in (
        (plan._replace(key_end=np.full(8, 64, np.int32)), case.sinks),
        (plan._replace(key_start=np.full(8, 64, np.int32)), None),
        (plan._replace(key_end=np.zeros(8, np.int32)), None),
    ):
        o, s = np.empty_like(case.q[0]), np.empty((8, 9), np.float32)
        paged_attention(
            case.q[0], paged.k_cache, paged.v_cache, paged.block_table, part,
            scale=16**-0.5, sinks=sinks, out=o, lse=s,
        )  # fmt: skip
        parts.append((torch.from_numpy(o), torch.from_numpy(s)))
    merged = merge_attention(*parts[0], *parts[1])
    assert largest_error([[part.numpy() for part in merged]], [(out, lse)]) < TOLERANCE
    again = merge_attention(*merged, *parts[2])
    assert torch.equal(again[0], merged[0]) and torch.equal(again[1], merged[1])
    empty = merge_attention(*parts[2], *parts[2])
    assert torch.all(empty[0] == 0) and torch.all(empty[1] == -torch.inf)


def test_items_cover_every_token_and_head_once() -> None:
    cu = np.array([0, 1, 120, 120, 137], np.int32)
    slots = np.array([5, 2, 3, 7], np.int32)
    positions = np.concatenate([np.arange(n) for n in (1, 119, 0, 17)]).astype(np.int32)
    plan = plan_attention(cu, slots, positions, num_q_heads=9, num_kv_heads=3, window=20)
    seen = np.zeros((137, 3), int)
    for head, start, end, first_segment, end_segment in plan.items:
        assert plan.segments[first_segment:end_segment].tolist() == [[start, end, 0, ALL_KEYS]]
        row = int(np.searchsorted(cu, start, side="right")) - 1
        assert (plan.slots[start:end] == slots[row]).all() and end <= cu[row + 1]
        seen[start:end, head] += 1
    assert (seen == 1).all()
    np.testing.assert_array_equal(plan.tokens, np.arange(137))
    np.testing.assert_array_equal(plan.key_end, positions + 1)
    np.testing.assert_array_equal(plan.key_start, np.maximum(positions - 19, 0))


def test_loaded_keys_of_chunks_windows_and_empty_rows() -> None:
    """Tokens of a chunk load their keys once; a row without tokens loads none and shares none."""
    slots = np.array([0, 1, 2, 0], np.int32)
    cu, positions = np.array([0, 4, 4, 5, 5], np.int32), np.array([96, 97, 98, 99, 299], np.int32)
    heads = {"num_q_heads": 4, "num_kv_heads": 2}
    assert loaded_keys(plan_attention(cu, slots, positions, **heads)) == 100 + 300
    assert loaded_keys(plan_attention(cu, slots, positions, window=10, **heads)) == 13 + 10
    table = np.arange(30, dtype=np.int32).reshape(3, 10)
    table[:, :8] = table[0, :8]  # 256 keys are common, but a row has no more than its own
    blocks = {"block_table": table, "block_size": 32}
    assert distinct_keys(cu, slots, positions, **blocks) == 100 + 300
    assert distinct_keys(cu, slots, positions + np.int32(200), **blocks) == 256 + 44 + 244
    none = np.empty(0, np.int32)
    assert distinct_keys(np.zeros(1, np.int32), none, none, **blocks) == 0


@pytest.mark.parametrize("block_size", [0, 16, 48, -32])
def test_block_size_must_be_a_multiple_of_32(block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"block_size is {block_size}"):
        cache_shapes(4, 1, 64, block_size)


def test_shapes_that_disagree_are_refused() -> None:
    case = make_case(Shape(head_dim=16), [(5, 2)])
    paged = page(case)
    plan = plan_attention(
        np.array([0, 2], np.int32), paged.slots, np.array([5, 6], np.int32),
        num_q_heads=9, num_kv_heads=3,
    )  # fmt: skip
    q, lse = case.q[0], np.empty((2, 9), np.float32)
    for bad_q, bad_out in ((q, q[:1]), (q[..., :8], q[..., :8]), (q[:1], q[:1])):
        with pytest.raises(ShapeError, match="disagree"):
            paged_attention(
                bad_q, paged.k_cache, paged.v_cache, paged.block_table, plan,
                scale=1.0, out=bad_out.copy(), lse=lse,
            )  # fmt: skip


@pytest.mark.parametrize("shape", [Shape(), Shape(num_kv_heads=9, head_dim=40, soft_cap=5.0)])
def test_bf16_keys_and_values_are_widened_exactly(shape: Shape) -> None:
    """The bits of the same numbers in fp32, in decoding, in runs, and in parts of blocks."""
    case = make_case(shape, [(0, 70), (100, 1), (33, 1), (257, 40)])
    paged = page(case)
    rounded = [torch.from_numpy(one).bfloat16() for one in (paged.k_cache, paged.v_cache)]
    wide = replace(paged, k_cache=rounded[0].float().numpy(), v_cache=rounded[1].float().numpy())
    bits = [one.view(torch.uint16).numpy() for one in rounded]
    narrow = replace(paged, k_cache=bits[0], v_cache=bits[1])
    for one, other in zip(run_whole(case, narrow), run_whole(case, wide), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
