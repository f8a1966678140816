"""Work items of GPU attention: every token meets every key it sees once, in numbered pieces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.errors import ShapeError
from batchwright.kernels.paged_attention.shared_nodes import SharedNode, find_shared_nodes
from batchwright.kernels.paged_attention.tiling import choose_tiling
from batchwright.kernels.paged_attention.work_list import DIRECT, WorkList, plan_work

pytestmark = pytest.mark.cpu

BLOCK_SIZE = 32


def table_of(prompts: list[list[int]], counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(block table, positions of the first query): rows with equal first letters share 128 keys
    for each, then comes a block that is nobody else's."""
    ids: dict[tuple[int, ...], int] = {}
    table = np.full((len(prompts), 40), 2**30, np.int32)
    per_letter = 128 // BLOCK_SIZE
    for row, prompt in enumerate(prompts):
        for i in range(len(prompt)):
            first = ids.setdefault(tuple(prompt[: i + 1]), per_letter * len(ids))
            table[row, per_letter * i : per_letter * (i + 1)] = first + np.arange(per_letter)
        own = per_letter * len(prompt)
        table[row, own : own + 2] = 100_000 + 2 * row, 100_001 + 2 * row
    return table, np.array([128 * len(prompt) + 3 for prompt in prompts], np.int64)


def seen_pairs(work: WorkList, table: np.ndarray) -> list[tuple[int, int, int]]:
    """(token, position, block) of every key that some item gives to a token."""
    pairs = []
    for first, count, slot, begin, end, _, _, _ in np.concatenate([work.narrow, work.wide]):
        for token in work.entry_tokens[first : first + count]:
            for key in range(begin, end):
                if work.key_start[token] <= key < work.key_end[token]:
                    pairs.append((int(token), key, int(table[slot, key // BLOCK_SIZE])))
    return sorted(pairs)


@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 1), max_size=4), st.integers(1, 40)), min_size=1,
        max_size=6,
    ),
    num_programs=st.tuples(*2 * [st.sampled_from([0, 1, 7, 500])]),
    window=st.sampled_from([None, 1, 150]),
    min_keys=st.sampled_from([128, 256]),
)  # fmt: skip
def test_every_token_meets_every_key_once(
    rows: list[tuple[list[int], int]],
    num_programs: tuple[int, int],
    window: int | None,
    min_keys: int,
) -> None:
    counts = [count for _, count in rows]
    table, starts = table_of([prompt for prompt, _ in rows], counts)
    cu = np.cumsum([0, *counts]).astype(np.int32)
    slots = np.arange(len(rows), dtype=np.int32)
    positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts)])
    positions = positions.astype(np.int32)
    nodes: list[SharedNode] = []
    if window is None:
        nodes = find_shared_nodes(cu, slots, positions, table, BLOCK_SIZE, min_keys=min_keys)
    tiling = choose_tiling(4, 64, 2)
    work = plan_work(
        cu, slots, positions, num_q_heads=8, num_kv_heads=2, tiling=tiling,
        num_programs=num_programs, window=window, nodes=nodes,
    )  # fmt: skip

    right = sorted(
        (token, key, int(table[row, key // BLOCK_SIZE]))
        for row in range(len(rows))
        for token in range(cu[row], cu[row + 1])
        for key in range(
            0 if window is None else max(0, positions[token] + 1 - window), positions[token] + 1
        )
    )
    assert seen_pairs(work, table) == right

    pieces: dict[int, list[int]] = {token: [] for token in range(len(positions))}
    for items, shape in ((work.narrow, tiling.narrow), (work.wide, tiling.wide)):
        for first, count, _, begin, end, full_end, piece, _ in items:
            tokens = work.entry_tokens[first : first + count]
            assert 1 <= count <= shape.num_rows // 4
            assert begin <= full_end <= end and begin % 128 == 0
            if window is None:  # keys that need no mask
                assert full_end <= work.key_end[tokens].min() or full_end == begin
            for token in tokens:
                pieces[int(token)].append(int(piece))
    merged = []
    for token, numbers in pieces.items():
        if numbers == [DIRECT]:
            assert work.num_partials[token] == 1
            continue
        assert sorted(numbers) == list(range(work.num_partials[token])) and len(numbers) > 1
        assert work.partial_start[token] == sum(work.num_partials[t] for t in merged)
        merged.append(token)
    assert merged == work.merged_tokens.tolist()
    assert work.total_partials == sum(work.num_partials[merged])


def test_each_level_of_the_tree_is_a_node() -> None:
    prompts = [[0, 0, 0], [0, 0, 1], [0, 0, 1], [1], [0, 1], [1]]
    table, starts = table_of(prompts, [1] * 6)
    cu, positions = np.arange(7, dtype=np.int32), starts.astype(np.int32)
    slots = np.arange(6, dtype=np.int32)

    def nodes(min_keys: int) -> list[tuple[list[int], int, int]]:
        found = find_shared_nodes(cu, slots, positions, table, BLOCK_SIZE, min_keys=min_keys)
        return sorted((sorted(rows.tolist()), begin, end) for rows, begin, end in found)

    assert nodes(128) == [
        ([0, 1, 2], 128, 256), ([0, 1, 2, 4], 0, 128), ([1, 2], 256, 384), ([3, 5], 0, 128),
    ]  # fmt: skip
    # 128 keys are too few for a node: what is below them takes them over
    assert nodes(256) == [([0, 1, 2], 0, 256)]


def test_long_ranges_fill_the_card() -> None:
    cu, slots = np.array([0, 1, 2], np.int32), np.array([0, 1], np.int32)
    positions = np.array([16383, 99], np.int32)
    work = plan_work(
        cu, slots, positions, num_q_heads=32, num_kv_heads=8, tiling=choose_tiling(4, 128, 2),
        num_programs=(256, 0),
    )  # fmt: skip
    keys = work.narrow[:, 4] - work.narrow[:, 3]
    assert 32 <= len(keys) <= 34 and keys[0] == 512 and keys[-1] == 100
    assert work.merged_tokens.tolist() == [0] and work.num_partials.tolist()[1] == 1


def test_narrow_and_wide_ranges_are_cut_apart() -> None:
    """A row that decodes and a chunk of a prompt, after 16,384 keys each."""
    cu, slots = np.array([0, 1, 513], np.int32), np.array([0, 1], np.int32)
    positions = np.array([16383, *range(16384, 16896)], np.int32)
    tiling = choose_tiling(4, 128, 2)

    def num_items(narrow: int, wide: int) -> tuple[int, int]:
        work = plan_work(
            cu, slots, positions, num_q_heads=32, num_kv_heads=8, tiling=tiling,
            num_programs=(narrow, wide),
        )  # fmt: skip
        return len(work.narrow), len(work.wide)

    tiles = 512 // (tiling.wide.num_rows // 4)
    assert num_items(0, 0) == (1, tiles)
    assert num_items(256, 0) == (32, tiles)
    narrow, wide = num_items(8, 2 * 8 * tiles)  # longer tiles than the mean are cut once more
    assert narrow == 1 and 2 * tiles <= wide <= 3 * tiles


@pytest.mark.parametrize(
    ("num_tokens", "context", "is_cut"),
    [
        (512, 0, False),
        (1024, 0, False),
        (512, 16384, False),
        (400, 16384, False),
        (384, 16384, True),
    ],
)
def test_wide_ranges_that_fill_the_card_stay_whole(
    num_tokens: int, context: int, is_cut: bool
) -> None:
    """132 multiprocessors, two programs each: 25 tiles of 8 heads are three quarters, not 24."""
    work = plan_work(
        np.array([0, num_tokens], np.int32), np.array([0], np.int32),
        np.arange(context, context + num_tokens, dtype=np.int32), num_q_heads=32, num_kv_heads=8,
        tiling=choose_tiling(4, 128, 2), num_programs=(8 * 132, 2 * 132),
    )  # fmt: skip
    assert (len(work.wide) > num_tokens // 16) == is_cut
    assert (len(work.merged_tokens) > 0) == is_cut


@pytest.mark.parametrize("group_size", [1, 4, 16, 17, 64, 71, 128])
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("head_dim, element_bytes", [(64, 2), (128, 2), (256, 2), (128, 4)])
def test_a_tile_holds_a_token_and_has_a_warp_for_16_rows(
    group_size: int, architecture: int, head_dim: int, element_bytes: int
) -> None:
    tiling = choose_tiling(group_size, head_dim, element_bytes, architecture=architecture)
    for shape in (tiling.narrow, tiling.wide):
        assert shape.num_rows >= group_size and shape.num_rows <= 16 * shape.num_warps


@pytest.mark.parametrize("group_size, head_dim", [(129, 64), (4, 257), (0, 64)])
def test_heads_that_no_tile_holds_are_refused(group_size: int, head_dim: int) -> None:
    with pytest.raises(ShapeError, match=f"{group_size} query heads per kv head"):
        choose_tiling(group_size, head_dim, 2)


@pytest.mark.parametrize("counts", [[], [0, 0], [0, 2, 0]])
def test_rows_without_tokens_make_no_items(counts: list[int]) -> None:
    work = plan_work(
        np.cumsum([0, *counts]).astype(np.int32), np.arange(len(counts), dtype=np.int32),
        np.arange(sum(counts), dtype=np.int32), num_q_heads=8, num_kv_heads=2,
        tiling=choose_tiling(4, 64, 2), num_programs=(100, 100),
    )  # fmt: skip
    assert len(work.narrow) == (sum(counts) > 0) and len(work.wide) == 0
    assert len(work.entry_tokens) == sum(counts) and work.total_partials == 0
