"""The layout in which fp32 weights are kept for products on CPU: panels of 32 output columns.

A panel holds, for each input feature, the weights of 32 outputs side by side: one vector load gives
what 32 chains of multiply-adds need next, and a panel is read from beginning to end. Packed weights
take the place of a checkpoint's, there is no second copy.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from numba import types

from batchwright.kernels import get_num_threads
from batchwright.kernels.parallel import compile_task, run_tasks

PANEL = 32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[out_features, in_features] -> [ceil(out_features / 32), in_features, 32], contiguous.

    fp32 on the CPU. Columns beyond out_features are zero.
    """
    out_features, in_features = weight.shape
    packed = torch.empty(-(-out_features // PANEL), in_features, PANEL)
    run_tasks(
        _worker().address, get_num_threads(), weight.contiguous().detach().numpy(), packed.numpy()
    )
    return packed


@functools.cache
def _worker() -> Any:
    return compile_task(_pack, types.float32[:, ::1], types.float32[:, :, ::1])


def _pack(worker: int, num_workers: int, weight: Any, packed: Any) -> None:
    """Panels in turns."""
    num_rows, in_features = weight.shape
    for panel in range(worker, len(packed), num_workers):
        width = min(PANEL, num_rows - panel * PANEL)
        for i in range(in_features):
            for column in range(width):
                packed[panel, i, column] = weight[panel * PANEL + column, i]
            for column in range(width, PANEL):
                packed[panel, i, column] = 0.0


def unpack(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """The weight [out_features, in_features] that `pack` was given."""
    return packed.transpose(1, 2).flatten(0, 1)[:out_features].contiguous()


def packed_rows(packed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` [num] int64 of the weight, e.g. embeddings that are tied to the output head.

    Returns [num, in_features].
    """
    return packed[ids // PANEL, :, ids % PANEL]
