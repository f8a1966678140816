"""Which leading keys do rows of a step share? The prefix tree of their block tables. No torch.

Every level of the tree can be attention of its own, computed once for all rows below it
(Hydragen, arXiv:2402.05099, section 3.3; ChunkAttention, arXiv:2402.15220).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.kernels.paged_attention.plan import _order_by_blocks, _shared_keys
from batchwright.request import Int32Array


class SharedNode(NamedTuple):
    """Keys [begin, end) that lie in the same blocks for all these rows.

    Attributes:
        rows: [n] int64, rows of the step; all query tokens of each see all these keys.
        begin, end: positions, multiples of 128.
    """

    rows: npt.NDArray[np.int64]
    begin: int
    end: int


def find_shared_nodes(
    cu_seqlens_q: Int32Array,
    row_slots: Int32Array,
    positions: Int32Array,
    block_table: Int32Array,
    block_size: int,
    *,
    min_keys: int = 256,
) -> list[SharedNode]:
    """Nodes of at least `min_keys` keys and two rows, ancestors first.

    Args:
        cu_seqlens_q, row_slots, positions: as in plan_work; no row is empty.
        block_table: [max_slots, max_blocks] int32, of layers without a window.
        min_keys: a shorter node is left to the nodes or rows below it: each node costs its rows a
            partial result.
    """
    if len(row_slots) < 2:
        return []
    key_end = positions + np.int32(1)
    order = _order_by_blocks(block_table, row_slots, -(-int(key_end.max()) // block_size))
    common = _shared_keys(cu_seqlens_q, row_slots, key_end, block_table, block_size, order)
    nodes = []
    open_runs = [(0, len(order), 0)]  # rows order[lo:hi], whose keys [0, covered) are taken
    while open_runs:
        lo, hi, covered = open_runs.pop()
        depth = int(common[lo : hi - 1].min())
        if depth - covered >= min_keys:
            nodes.append(SharedNode(order[lo:hi], covered, depth))
            covered = depth
        ends = lo + 1 + np.flatnonzero(common[lo : hi - 1] == depth)
        starts = np.concatenate([[lo], ends])
        ends = np.concatenate([ends, [hi]])
        deeper = ends - starts > 1
        runs = zip(starts[deeper].tolist(), ends[deeper].tolist(), strict=True)
        open_runs += [(start, end, covered) for start, end in runs]
    return nodes
