"""Golden values of BatchLLM's grouping, and the dynamic program against brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.plan.job_tree import ROOT, JobTree
from batchwright.plan.orders.groups import groups, single_level
from tests.plan.tries import branching, job_of, tree_of

VECTOR_A = branching(20, [(100, 4), (100, 4)])
VECTOR_B = branching(20, [(5, 4), (5, 4)])


def multi_level_saving(tree: JobTree) -> int:
    return int(((tree.num_users - 1) * (tree.depth - tree.start))[1:].sum())


def brute_force_saving(tree: JobTree) -> int:
    """Best over all sets of chosen nodes; a row uses the deepest chosen node above its end."""
    best = 0
    nodes = [node for node in range(1, tree.num_nodes) if tree.num_users[node] > 1]
    for chosen in product([False, True], repeat=len(nodes)):
        kept = {node for node, is_chosen in zip(nodes, chosen) if is_chosen}
        saved = -sum(int(tree.depth[node]) for node in kept)
        for node in tree.node_of_row.tolist():
            while node and node not in kept:
                node = int(tree.parent[node])
            saved += int(tree.depth[node])
        best = max(best, saved)
    return best


def greedy_saving(tree: JobTree) -> int:
    """The paper's rule: a grandchild leaves its parent if that alone pays."""
    children = [[] for _ in range(tree.num_nodes)]
    for node in range(1, tree.num_nodes):
        children[tree.parent[node]].append(node)

    def reduce(node: int) -> list[tuple[int, int]]:
        """(tokens, leaves) of the first-level groups below a node."""
        tokens = int(tree.depth[node] - tree.start[node])
        kept, leaving = int(tree.num_ending[node]), []
        for child in children[node]:
            for length, leaves in reduce(child):
                if node and (leaves - 1) * length - tokens > 0:
                    leaving.append((tokens + length, leaves))
                elif node:
                    kept += leaves
                else:
                    leaving.append((length, leaves))
        return leaving + ([(tokens, kept)] if kept else [])

    return sum(length * (leaves - 1) for length, leaves in reduce(ROOT))


@pytest.mark.parametrize(
    "prompts, multi_level, best", [(VECTOR_A, 740, 720), (VECTOR_B, 170, 150)], ids=["A", "B"]
)
def test_golden_vectors(prompts, multi_level: int, best: int) -> None:
    tree = tree_of(prompts)
    assert multi_level_saving(tree) == multi_level
    assert single_level(tree).num_saved_tokens == best == brute_force_saving(tree)


def test_the_greedy_rule_misses_what_the_program_finds() -> None:
    assert greedy_saving(tree_of(VECTOR_A)) == 720
    assert greedy_saving(tree_of(VECTOR_B)) == 140


@pytest.mark.parametrize("num_groups", [1, 7])
def test_the_paper_s_benchmark_saves_85_percent(num_groups: int) -> None:
    """Prefix 2,000 shared by 16, suffix 200: 1 - (2000 / 16 + 200) / 2200."""
    prompts = [
        [group] * 2000 + [row + 100] * 200 for group in range(num_groups) for row in range(16)
    ]
    saved = single_level(tree_of(prompts)).num_saved_tokens
    assert round(saved / (2200 * len(prompts)), 3) == 0.852


TRIES = st.lists(st.lists(st.integers(0, 1), max_size=6), max_size=9)


@settings(max_examples=300)
@given(TRIES, st.sampled_from([1, 2, 3]), st.integers(1, 4))
def test_program_is_optimal_on_random_tries(prompts, block_size: int, stretch: int) -> None:
    prompts = [[token for token in prompt for _ in range(stretch)] for prompt in prompts]
    tree = tree_of(prompts).in_blocks(block_size)
    grouping = single_level(tree)
    assert grouping.num_saved_tokens == brute_force_saving(tree)
    assert grouping.num_saved_tokens <= multi_level_saving(tree)
    if block_size == 1:
        assert greedy_saving(tree) <= grouping.num_saved_tokens


@settings(max_examples=200)
@given(TRIES)
def test_the_groups_save_what_the_program_says(prompts) -> None:
    tree = tree_of(prompts)
    group_of_row, saved = single_level(tree)
    used = [node for node in set(group_of_row.tolist()) if node != ROOT]
    assert saved == sum(
        int(tree.depth[node]) * (np.count_nonzero(group_of_row == node) - 1) for node in used
    )
    for row, node in enumerate(group_of_row.tolist()):
        assert row in tree.rows[tree.first[node] : tree.end[node]]
    assert all(np.count_nonzero(group_of_row == node) > 1 for node in used), "a group of one"


def test_a_deep_chain_is_quick_and_needs_no_recursion() -> None:
    tree = tree_of([[0] * length for length in range(1, 1500)])
    grouping = single_level(tree)
    assert 0 < grouping.num_saved_tokens < multi_level_saving(tree)


def test_groups_that_decode_most_go_first_and_stay_together() -> None:
    prompts = [[1, 1, 7], [2, 2, 8], [1, 1, 9], [2, 2, 5], [4, 4, 4, 4, 4]]
    rows = groups(job_of(prompts, [1, 10, 1, 1, 3])).rows.tolist()
    assert rows == [1, 3, 4, 0, 2]  # 11 / 4, 3 / 5, 2 / 4
    assert groups(job_of(prompts, [1, 10, 1, 1, 3], continues=2)).rows.tolist()[:2] == [2, 0]
