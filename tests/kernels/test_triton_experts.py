"""The GPU kernels of mixtures of experts against their twin: on a card, or in the interpreter."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    DEVICE = "cuda"
elif os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE = "cpu"
else:
    pytest.skip("no CUDA device and no interpreter", allow_module_level=True)

from batchwright.errors import ShapeError
from batchwright.kernels.expert_product import naive
from batchwright.kernels.expert_product.triton import (
    ProductTile,
    expert_product,
    sort_by_expert,
    sum_ranks,
)
from benchmarks.gpu.expert_case import expert_errors

SMALL = ProductTile(16, 16, 16, 4, 2)
HALVED = ProductTile(128, 16, 16, 4, 2)  # experts' last rows are half a tile, or one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(13, 5, 2, 24, 20), (1, 8, 2, 16, 33), (40, 3, 1, 40, 16)], ids=str
)
def test_equals_twin(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    errors = expert_errors(*shape, dtype, DEVICE, tile=SMALL)
    assert all(error <= tolerance for error, tolerance in errors.values()), errors


@pytest.mark.parametrize("num_tokens", [60, 200])
def test_half_tiles_equal_the_twin(num_tokens: int) -> None:
    errors = expert_errors(num_tokens, 3, 2, 24, 20, torch.float32, DEVICE, tile=HALVED)
    assert all(error <= tolerance for error, tolerance in errors.values()), errors


@pytest.mark.parametrize("tile", [SMALL, HALVED], ids=["small", "halved"])
def test_a_row_does_not_depend_on_the_others(tile: ProductTile) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 24, generator=generator).to(DEVICE)
    weight = torch.randn(4, 20, 24, generator=generator).to(DEVICE)
    experts = torch.tensor([[2], [0], [2], [2], [3], [0], [2], [3], [2]], device=DEVICE)
    outs = []
    for tokens in (slice(None), slice(2, 7)):
        rows = sort_by_expert(experts[tokens].contiguous(), 4)
        out = x.new_full((len(experts[tokens]), 20), torch.nan)
        expert_product(x[tokens], weight, rows, out, top_k=1, to_pairs=True, tile=tile)
        outs.append(out)
    assert torch.equal(outs[0][2:7], outs[1])


def test_disagreeing_tensors_are_refused() -> None:
    x, weight, out = torch.zeros(4, 8), torch.zeros(3, 6, 8), torch.zeros(4, 6)
    rows = naive.sort_by_expert(torch.tensor([[0], [2], [1], [1]]), 3)
    rows = type(sort_by_expert(torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), 1))(*rows)
    with pytest.raises(ShapeError, match="disagree"):
        expert_product(x[:, :7], weight, rows, out)
    with pytest.raises(ShapeError, match="disagree"):
        expert_product(x, weight.half(), rows, out)
    with pytest.raises(ShapeError, match="contiguous"):
        expert_product(x, weight.transpose(1, 2).contiguous().transpose(1, 2), rows, out)
    with pytest.raises(ShapeError, match="1024"):
        sort_by_expert(torch.zeros(4, 1, dtype=torch.int32), 2000)
    with pytest.raises(ShapeError, match="float32"):
        sort_by_expert(torch.zeros(4, 1), 2)
    with pytest.raises(ShapeError, match="disagree"):
        sum_ranks(torch.zeros(4, 2, 8), torch.zeros(4, 1), x)
