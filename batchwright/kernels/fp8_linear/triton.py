"""Products in 8-bit floating point on a GPU: rows are quantised by a kernel, torch multiplies.

Needs a tensor core that takes e4m3: compute capability 8.9 or more. Level *rounding*: which of
cuBLAS's and CUTLASS's kernels torch takes depends on the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batchwright.errors import ShapeError
from batchwright.kernels.fp8_linear.naive import FP8

MAX_SIZE = 65536


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As naive.quantize_rows; rows of x may be strided, and have at most MAX_SIZE numbers.

    Level bits in itself: a row is one program's.
    """
    num_rows, size = x.shape
    if x.stride(1) != 1 and size > 1:
        raise ShapeError("quantize_rows: rows must be contiguous; call .contiguous()")
    if size > MAX_SIZE:
        raise ShapeError(f"quantize_rows: rows of {size} numbers; the limit is {MAX_SIZE}")
    values = torch.empty((num_rows, size), dtype=FP8, device=x.device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        _quantize_rows[(num_rows,)](
            x, values, scales, size, x.stride(0), BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return values, scales


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As naive.fp8_linear; x is bf16.

    Sums are the tensor cores' fast ones: on Hopper with 14 bits, of the largest summand, within the
    products of an instruction and between them. They are rounded to bf16 once.
    """
    values, row_scales = quantize_rows(x)
    return torch._scaled_mm(
        values, weight.T, row_scales, scales.T, bias=bias, out_dtype=x.dtype, use_fast_accum=True
    )


@triton.jit
def _quantize_rows(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    held = column < size
    numbers = tl.load(x + row * x_stride + column, mask=held, other=0.0).to(tl.float32)
    magnitudes = tl.abs(numbers)
    largest = tl.max(magnitudes, 0)
    # tl.max passes a NaN over
    is_nan = tl.max((magnitudes != magnitudes).to(tl.int32), 0) > 0
    largest = tl.where(is_nan, float("nan"), largest)
    scale = largest * (1.0 / 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    scaled = tl.clamp(numbers / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scales + row, scale)
    tl.store(values + row * size + column, scaled.to(values.dtype.element_ty), mask=held)
