"""Start-up check of contract 1: that BLAS gives a row of a product the same bits in every batch.

No BLAS promises it. Measured on Zen 3 with MKL it holds from 12 rows on, because the kernels for
smaller products differ; elsewhere it may take more rows, or products of one fixed size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from batchwright.models.causal_lm import CausalLM
from batchwright.models.layers import MIN_ROWS, Linear

logger = logging.getLogger(__name__)

REMEDIES = ((MIN_ROWS, None), (16, None), (24, None), (32, None), (64, None), (64, 64), (16, 16))
"""(min_rows, tile_rows) in the order they are tried, cheapest first."""

_BATCH_SIZES = (1, 31, 13, 12, 64, 17, 23, 100, 33, 257, 18, 129, 47, 510, 28, 1023)
_MAX_FLOPS = 1.8e9  # per shape; all of SmolLM2 takes 0.2 s on 2 cores, half of it the output head
_MIN_ROWS = 88  # in all products of a shape together, also where that is dearer


def ensure_row_invariance(model: CausalLM, max_rows: int) -> bool:
    """Check every distinct product of the model and repair the `Linear`s whose rows vary.

    Args:
        model: loaded; its own weights are multiplied.
        max_rows: most tokens in a step. Larger products are checked as far as time allows.
    Returns:
        Whether a row now has the same bits in every batch that was tried. False at once on GPUs
        and for dtypes other than fp32, which promise only level rounding.

    One warning tells of all repairs, one of what could not be repaired.
    """
    repaired, hopeless = [], []
    for linears in _by_shape(model):
        weight = linears[0].weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            return False
        remedy = find_remedy(linears[0], max_rows)
        if remedy is None:
            hopeless.append(f"{weight.shape[1]}x{weight.shape[0]}")
        elif remedy != REMEDIES[0]:
            repaired.append(f"{weight.shape[1]}x{weight.shape[0]}")
        for linear in linears:
            linear.min_rows, linear.tile_rows = remedy or REMEDIES[0]
    if repaired:
        logger.warning(
            "this BLAS rounds a row of products %s otherwise in small batches; "
            "they run padded or in tiles, which is exact but slower",
            ", ".join(repaired),
        )
    if hopeless:
        logger.warning(
            "this BLAS rounds a row of products %s by its place in the batch; "
            "results may differ in the last bits with batch size and order",
            ", ".join(hopeless),
        )
    return not hopeless


def rows_are_invariant(linear: Linear, max_rows: int) -> bool:
    """Whether rows of `linear` have the same bits alone and in batches of many sizes and offsets.

    Args:
        linear: fp32.
        max_rows: the largest batch, as far as the limit on FLOPs allows.
    """
    out_features, in_features = linear.weight.shape
    affordable = max(int(_MAX_FLOPS / (2 * in_features * out_features)), _MIN_ROWS)
    num_rows = max(min(max_rows, affordable * 3 // 4), _MIN_ROWS // 2)
    x = torch.randn(97, in_features, generator=torch.Generator().manual_seed(0))
    x = x[torch.arange(num_rows) % 97]  # as good as new random rows, and quicker
    expected = linear(x)
    affordable -= num_rows
    for index, size in enumerate(size for size in _BATCH_SIZES if size <= num_rows):
        affordable -= max(size, linear.min_rows)
        if index > 0 and affordable < 0:
            break
        start = min(5 * index + 1, num_rows - size)
        rows = slice(start, start + size)
        if not torch.equal(linear(x[rows]), expected[rows]):
            return False
    return True


def _by_shape(model: CausalLM) -> Iterator[list[Linear]]:
    """Linears that make the same product, together."""
    groups: dict[tuple[torch.Size, bool], list[Linear]] = {}
    for module in model.modules():
        if isinstance(module, Linear):
            key = (module.weight.shape, module.bias is not None)
            groups.setdefault(key, []).append(module)
    yield from groups.values()


@torch.inference_mode()
def find_remedy(linear: Linear, max_rows: int) -> tuple[int, int | None] | None:
    """The cheapest (min_rows, tile_rows) with which rows are invariant; `linear` then has them."""
    for remedy in REMEDIES:
        linear.min_rows, linear.tile_rows = remedy
        if rows_are_invariant(linear, max_rows):
            return remedy
    return None
