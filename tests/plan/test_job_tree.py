"""The prefix tree of a job against brute force on random tries, and inputs made to be hard."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.kernels.prefix_sort import naive, numba
from batchwright.plan.job_tree import ROOT, JobTree, build_job_tree
from tests.plan.tries import arrays, tree_of

PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=7), max_size=14)


def paths(tree: JobTree, prompts: list[list[int]], spaces: list[int]) -> dict[tuple, list[int]]:
    """Every node by the tokens down to its end, and its users."""
    found = {}
    for node in range(1, tree.num_nodes):
        users = tree.rows[tree.first[node] : tree.end[node]].tolist()
        texts = {(spaces[row], *prompts[row][: tree.depth[node]]) for row in users}
        assert len(texts) == 1, "users of a node differ above its end"
        (text,) = texts
        assert text not in found, "two nodes for the same tokens"
        found[text] = users
    return found


@settings(max_examples=300)
@given(PROMPTS, st.data())
def test_tree_is_the_compressed_trie(prompts: list[list[int]], data: st.DataObject) -> None:
    spaces = data.draw(st.lists(st.integers(0, 1), min_size=len(prompts), max_size=len(prompts)))
    tokens, offsets = arrays(prompts)
    tree = build_job_tree(tokens, offsets, np.array(spaces, np.int32))
    keyed = [(space, *prompt) for space, prompt in zip(spaces, prompts)]
    prefixes = {key[:end] for key in keyed for end in range(2, len(key) + 1)}
    branching = {
        p
        for p in prefixes
        if len({key[len(p)] for key in keyed if len(key) > len(p) and key[: len(p)] == p}) > 1
    }
    ends = {key for key in keyed if len(key) > 1}
    found = paths(tree, prompts, spaces)
    assert set(found) == branching | ends
    for text, users in found.items():
        assert sorted(users) == [r for r, key in enumerate(keyed) if key[: len(text)] == text]
    assert tree.num_distinct_tokens() == len(prefixes)
    for row, key in enumerate(keyed):
        node = tree.node_of_row[row]
        assert tree.depth[node] == len(prompts[row])
        assert node == ROOT or row in found[key]


@settings(max_examples=100)
@given(PROMPTS)
def test_nodes_are_numbered_depth_first(prompts: list[list[int]]) -> None:
    tree = tree_of(prompts)
    below = [
        {v for v in range(tree.num_nodes) if ancestor in ancestors(tree, v)}
        for ancestor in range(tree.num_nodes)
    ]
    assert [set(range(v, end)) for v, end in enumerate(tree.subtree_end.tolist())] == below
    values = np.arange(tree.num_nodes)
    assert tree.sum_over_subtree(values).tolist() == [sum(nodes) for nodes in below]
    on_path = [sum(ancestors(tree, v)) for v in range(tree.num_nodes)]
    assert tree.sum_over_path(values).tolist() == on_path
    row_values = np.arange(tree.num_rows) + 1
    expected = [
        sum(row_values[r] for r in range(tree.num_rows) if tree.node_of_row[r] in nodes)
        for nodes in below
    ]
    assert tree.sum_over_users(row_values).tolist() == expected
    assert tree.num_ending.sum() == tree.num_rows
    if prompts:
        arrivals = np.array([hash((row, 3)) % 100 for row in range(tree.num_rows)])
        least = [
            min(arrivals[tree.rows[tree.first[node] : tree.end[node]]])
            for node in range(tree.num_nodes)
        ]
        assert tree.min_over_users(arrivals).tolist() == least


def ancestors(tree: JobTree, node: int) -> set[int]:
    found = {node}
    while node:
        node = int(tree.parent[node])
        found.add(node)
    return found


@settings(max_examples=200)
@given(PROMPTS, st.randoms(use_true_random=False))
def test_depth_first_keeps_subtrees_whole_and_siblings_by_key(prompts, random) -> None:
    tree = tree_of(prompts)
    key = np.array([random.random() for _ in range(tree.num_nodes)])
    rows, first_line = tree.depth_first(key)
    assert sorted(rows.tolist()) == list(range(len(prompts)))
    place = np.argsort(rows)
    first_place = np.full(tree.num_nodes, -1)
    for node in range(tree.num_nodes):
        places = np.sort(place[tree.rows[tree.first[node] : tree.end[node]]])
        if len(places):
            first_place[node] = places[0]
            assert first_line[node] == places[0]
            assert places.tolist() == list(range(places[0], places[0] + len(places)))
    for a in range(1, tree.num_nodes):
        for b in range(1, tree.num_nodes):
            if tree.parent[a] == tree.parent[b] and key[a] < key[b]:
                assert first_place[a] < first_place[b]
    for row, node in enumerate(tree.node_of_row):
        assert place[row] < first_place[node] + tree.num_ending[node]


@settings(max_examples=100)
@given(PROMPTS)
def test_fast_sort_equals_its_twin(prompts: list[list[int]]) -> None:
    tokens, offsets = arrays(prompts)
    groups = np.arange(len(prompts)) % 2
    for fast, slow in zip(
        numba.sort_prompts(tokens, offsets, groups), naive.sort_prompts(tokens, offsets, groups)
    ):
        assert fast.tolist() == slow.tolist()


def test_a_worked_example() -> None:
    tree = tree_of([[1, 2, 3, 4, 5], [1, 2, 3], [7], [1, 2, 3, 4, 6]])
    assert tree.rows.tolist() == [1, 0, 3, 2]
    assert tree.parent.tolist() == [-1, 0, 1, 2, 2, 0]
    assert tree.depth.tolist() == [0, 3, 4, 5, 5, 1]
    assert tree.start.tolist() == [0, 0, 3, 4, 4, 0]
    assert tree.num_users.tolist() == [4, 3, 2, 1, 1, 1]
    assert tree.num_ending.tolist() == [0, 1, 0, 1, 1, 1]
    assert tree.num_distinct_tokens() == 7
    assert tree.in_blocks(2).depth.tolist() == [0, 2, 4, 4, 4, 0]
    assert tree.in_blocks(2).num_distinct_tokens() == 4


def test_tokens_may_be_any_int32() -> None:
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    tree = tree_of([[high], [low], [], [high, low]])
    assert tree.rows.tolist() == [2, 1, 0, 3]


@pytest.mark.parametrize(
    "name", ["identical", "nested", "one long", "long and its end", "empty", "nothing", "unrelated"]
)
def test_hard_inputs_are_quick(name: str) -> None:
    tree_of([[0, 1], [0, 2]])  # compile
    ramp = np.arange(1_000_000, dtype=np.int32) % 50_000
    lengths = {
        "identical": np.full(1_000_000, 3),
        "nested": np.arange(2_000),
        "one long": np.array([1_000_000]),
        "long and its end": np.array([1_000_000, 999_999, 1_000_000]),
        "empty": np.zeros(1_000_000, int),
        "nothing": np.zeros(0, int),
        "unrelated": np.full(100_000, 8),
    }[name]
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    if name == "unrelated":
        tokens = np.random.default_rng(1).integers(0, 50_000, offsets[-1], dtype=np.int32)
    else:
        tokens = np.concatenate([np.empty(0, np.int32)])
        if name == "identical":
            tokens = np.tile(ramp[:3], len(lengths))
        elif name != "empty" and len(lengths):
            tokens = np.concatenate([ramp[:length] for length in lengths])
    start_s = time.process_time()
    tree = build_job_tree(tokens, offsets)
    tree.depth_first(np.arange(tree.num_nodes))
    assert time.process_time() - start_s < 10
    expected = {"identical": 2, "nested": 2_000, "one long": 2, "long and its end": 3}
    expected |= {"empty": 1, "nothing": 1}
    assert tree.num_nodes == expected.get(name, tree.num_nodes)
