"""Which processor cores each replica gets: a part of one memory node, or whole nodes.

Memory of another node (NUMA: a socket, or a part of one) is slower to reach, so a replica should
not stand on two nodes where it fits on one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

NODES = Path("/sys/devices/system/node")
CPUS = Path("/sys/devices/system/cpu")


class Place(NamedTuple):
    """Where a replica runs.

    Attributes:
        node: the memory node of its first core, counted from 0 among those that are used.
        cores: what it is pinned to.
    """

    node: int
    cores: tuple[int, ...]


def places_for(num_replicas: int) -> list[Place]:
    """Places for so many replicas on the cores that this process may use."""
    return divide_cores(read_nodes(os.sched_getaffinity(0)), num_replicas)


def read_nodes(allowed: Collection[int], nodes: Path = NODES, cpus: Path = CPUS) -> list[list[int]]:
    """The allowed cores of each memory node that has any; threads of one core are neighbours.

    Args:
        allowed: cores that may be used.
        nodes, cpus: where Linux describes them; without that there is one node.
    """
    found, left = [], set(allowed)
    for path in sorted(nodes.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        cores = left & set(parse_list(_text(path / "cpulist")))
        left -= cores
        found.append(_neighbours(cores, cpus))
    return [cores for cores in (*found, _neighbours(left, cpus)) if cores]


def divide_cores(nodes: Sequence[Sequence[int]], num_replicas: int) -> list[Place]:
    """Places for so many replicas; no core is in two of them unless there are too few.

    With fewer replicas than nodes each gets whole nodes; otherwise each stands on one node, and
    nodes get replicas by their cores.
    """
    cores = [core for node in nodes for core in node]
    node_of = {core: number for number, node in enumerate(nodes) for core in node}
    if num_replicas >= len(cores):
        shared = [cores[replica % len(cores)] for replica in range(num_replicas)]
        return [Place(node_of[core], (core,)) for core in sorted(shared, key=cores.index)]
    if num_replicas < len(nodes):
        groups = _even_parts(list(range(len(nodes))), num_replicas)
        return [
            Place(group[0], tuple(core for node in group for core in nodes[node]))
            for group in groups
        ]
    counts = [1] * len(nodes)
    while sum(counts) < num_replicas:  # the next one to the node with most cores for each of its
        roomy = max(range(len(nodes)), key=lambda node: len(nodes[node]) / (counts[node] + 1))
        counts[roomy] += 1
    return [
        Place(number, tuple(part))
        for number, (node, count) in enumerate(zip(nodes, counts, strict=True))
        for part in _even_parts(list(node), count)
    ]


def parse_list(text: str) -> list[int]:
    """Numbers of a list as Linux writes it: "0-3,8" is 0, 1, 2, 3, 8."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def _neighbours(cores: Collection[int], cpus: Path) -> list[int]:
    """Cores in order, those that are threads of one physical core side by side."""

    def physical(core: int) -> int:
        siblings = parse_list(_text(cpus / f"cpu{core}" / "topology" / "thread_siblings_list"))
        return min(siblings, default=core)

    return sorted(cores, key=lambda core: (physical(core), core))


def _even_parts(items: list[int], num_parts: int) -> list[list[int]]:
    ends = [len(items) * part // num_parts for part in range(num_parts + 1)]
    return [items[start:end] for start, end in pairwise(ends)]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
