"""PrefixTree against dictionaries of whole prefixes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchwright.plan.prefix_tree import PrefixTree


def prefixes(namespace: str, prompt: list[int], block_size: int) -> list[tuple[str, tuple]]:
    """Every full-block prefix of a prompt."""
    ends = range(block_size, len(prompt) + 1, block_size)
    return [(namespace, tuple(prompt[:end])) for end in ends]


class PrefixTreeMachine(RuleBasedStateMachine):
    """Rows come, are started, go back to waiting, and are forgotten."""

    def __init__(self):
        super().__init__()
        self.prompts: list[list[int]] = [[]]
        self.waiting: list[tuple[list, np.ndarray]] = []
        self.started: list[tuple[list, np.ndarray]] = []
        self.node_of: dict = {}

    @initialize(block_size=st.integers(1, 4))
    def start_tree(self, block_size):
        self.tree = PrefixTree(block_size)

    @rule(
        namespace=st.sampled_from(["", "a"]),
        place=st.integers(0, 20),
        num_shared=st.integers(0, 12),
        own=st.lists(st.integers(0, 2), max_size=6),
        num_rows=st.integers(1, 3),
    )
    def add(self, namespace, place, num_shared, own, num_rows):
        prompt = self.prompts[place % len(self.prompts)][:num_shared] + own
        self.prompts.append(prompt)
        keys = prefixes(namespace, prompt, self.tree.block_size)
        nodes = self.tree.add(namespace, np.array(prompt, np.int32), num_rows)
        assert self.tree.depth[nodes].tolist() == list(range(len(keys)))
        for key, node in zip(keys, nodes.tolist(), strict=True):
            assert self.node_of.setdefault(key, node) == node, "one prefix, two nodes"
        self.waiting += [(keys, nodes)] * num_rows

    @precondition(lambda self: self.waiting)
    @rule(place=st.integers(0, 99))
    def start(self, place):
        row = self.waiting.pop(place % len(self.waiting))
        self.started.append(row)
        unused = self.tree.start(row[1]).tolist()
        users = Counter(key for keys, _ in self.waiting for key in keys)
        assert unused == [n for key, n in zip(*row) if not users[key]]

    @precondition(lambda self: self.started)
    @rule(place=st.integers(0, 99))
    def wait_again(self, place):
        row = self.started.pop(place % len(self.started))
        self.waiting.append(row)
        self.tree.wait_again(row[1])

    @precondition(lambda self: self.started)
    @rule(place=st.integers(0, 99))
    def forget(self, place):
        row = self.started.pop(place % len(self.started))
        self.tree.forget(row[1])
        known = {key for keys, _ in self.waiting + self.started for key in keys}
        self.node_of = {key: node for key, node in self.node_of.items() if key in known}

    @invariant()
    def counts_are_right(self):
        if not hasattr(self, "tree"):
            return
        assert len(set(self.node_of.values())) == len(self.node_of) == len(self.tree)
        users = Counter(key for keys, _ in self.waiting for key in keys)
        for key, node in self.node_of.items():
            assert self.tree.num_waiting[node] == users[key]
        assert self.tree.num_waiting.sum() == sum(users.values())


class TestPrefixTree(PrefixTreeMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=30)


@pytest.mark.slow
class TestPrefixTreeForLong(PrefixTreeMachine.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=60, derandomize=False)


def test_it_grows_and_uses_node_ids_again() -> None:
    tree = PrefixTree(block_size=1)
    rows = [tree.add("", np.array([row, 0, 1], np.int32)) for row in range(1500)]
    assert len(tree) == 4500 and len(set(np.concatenate(rows).tolist())) == 4500
    assert tree.capacity == len(tree.depth) >= 4500
    capacity = tree.capacity
    for nodes in rows:
        tree.start(nodes)
        tree.forget(nodes)
    assert len(tree) == 0 and not tree.num_waiting.any()
    rows = [tree.add("", np.array([row, 2, 3], np.int32)) for row in range(1500)]
    assert tree.capacity == capacity and len(set(np.concatenate(rows).tolist())) == 4500
    assert all(tree.depth[nodes].tolist() == [0, 1, 2] for nodes in rows)


def test_prompts_are_told_apart_by_all_their_tokens() -> None:
    """Token ids that agree in their low bytes, and blocks that agree below different parents."""
    tree = PrefixTree(block_size=2)
    prompts = [[1, 2, 1, 2], [257, 2, 1, 2], [1, 2 + 2**24, 1, 2], [1, 2]]
    nodes = [tree.add("", np.array(prompt)) for prompt in prompts]
    assert len({node for row in nodes for node in row.tolist()}) == 6
    assert nodes[3].tolist() == nodes[0][:1].tolist()
    assert not set(tree.add("other", np.array([1, 2])).tolist()) & set(nodes[0].tolist())
