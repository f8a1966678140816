"""Cores of made-up machines, divided among replicas."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchwright.data_parallel.cores import Place, divide_cores, parse_list, read_nodes


def machine(path: Path, nodes: dict[int, str], siblings: dict[int, str] | None = None) -> dict:
    """Folders as Linux has them; returns arguments of `read_nodes`."""
    for number, cores in nodes.items():
        (path / "node" / f"node{number}").mkdir(parents=True)
        (path / "node" / f"node{number}" / "cpulist").write_text(cores + "\n")
    (path / "node" / "online").write_text("0\n")
    for core, text in (siblings or {}).items():
        (path / "cpu" / f"cpu{core}" / "topology").mkdir(parents=True)
        (path / "cpu" / f"cpu{core}" / "topology" / "thread_siblings_list").write_text(text + "\n")
    return {"nodes": path / "node", "cpus": path / "cpu"}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0-3,8\n", [0, 1, 2, 3, 8]), ("5", [5]), ("", []), ("\n", []), ("0,2-3", [0, 2, 3])],
)
def test_lists_as_linux_writes_them(text, numbers):
    assert parse_list(text) == numbers


def test_nodes_are_read_and_cut_to_the_allowed_cores(tmp_path):
    where = machine(tmp_path, {0: "0-3", 1: "4-7", 10: "8-9", 2: "10", 3: ""})
    assert read_nodes(range(11), **where) == [[0, 1, 2, 3], [4, 5, 6, 7], [10], [8, 9]]
    assert read_nodes({1, 2, 9}, **where) == [[1, 2], [9]]
    assert read_nodes({3, 99}, **where) == [[3], [99]]  # a core of no node that is told


def test_without_nodes_there_is_one(tmp_path):
    assert read_nodes({2, 0, 1}, nodes=tmp_path / "none", cpus=tmp_path) == [[0, 1, 2]]


def test_threads_of_one_core_are_neighbours(tmp_path):
    where = machine(tmp_path, {0: "0-3"}, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert read_nodes(range(4), **where) == [[0, 2, 1, 3]]


ONE, TWO = [[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("nodes", "num", "parts"),
    [
        (ONE, 1, [(0, range(8))]),
        (ONE, 2, [(0, range(4)), (0, range(4, 8))]),
        (ONE, 3, [(0, (0, 1)), (0, (2, 3, 4)), (0, (5, 6, 7))]),
        (TWO, 1, [(0, range(8))]),
        (TWO, 2, [(0, range(4)), (1, range(4, 8))]),
        (TWO, 4, [(0, (0, 1)), (0, (2, 3)), (1, (4, 5)), (1, (6, 7))]),
        # three on two nodes: none stands on both
        (TWO, 3, [(0, (0, 1)), (0, (2, 3)), (1, (4, 5, 6, 7))]),
        # nodes get replicas by their cores
        ([[0, 1, 2, 3, 4, 5], [6, 7]], 4, [(0, (0, 1)), (0, (2, 3)), (0, (4, 5)), (1, (6, 7))]),
        # whole nodes
        ([[0, 1], [2, 3], [4, 5], [6, 7]], 2, [(0, range(4)), (2, range(4, 8))]),
        ([[0, 1], [2, 3], [4, 5]], 2, [(0, (0, 1)), (1, range(2, 6))]),
        # more replicas than cores share them
        ([[0], [1]], 3, [(0, (0,)), (0, (0,)), (1, (1,))]),
    ],
)
def test_cores_are_divided(nodes, num, parts):
    assert divide_cores(nodes, num) == [Place(node, tuple(cores)) for node, cores in parts]


@pytest.mark.parametrize("num", range(1, 17))
@pytest.mark.parametrize("nodes", [ONE, TWO, [[0, 1, 2], [3], [4, 5, 6, 7]]])
def test_every_core_is_in_one_place_and_places_stay_on_a_node(nodes, num):
    places = divide_cores(nodes, num)
    assert len(places) == num
    cores = [core for place in places for core in place.cores]
    if num <= 8:
        assert sorted(cores) == list(range(8))
    else:
        assert set(cores) == set(range(8))
    for place in places:
        assert place.cores[0] in nodes[place.node]
        if num >= len(nodes):
            assert set(place.cores) <= set(nodes[place.node])
