"""Random fp8 products for the GPU kernels, against their twins."""

from __future__ import annotations

import torch

from batchwright.kernels.expert_product import naive as naive_experts
from batchwright.kernels.expert_product.triton import (
    ProductTile,
    expert_mlp,
    expert_product,
    sort_by_expert,
)
from batchwright.kernels.fp8_linear import naive
from batchwright.kernels.fp8_linear.triton import fp8_linear, quantize_rows
from batchwright.kernels.gated_activation.naive import gated_activation
from benchmarks.gpu.attention_case import relative_error
from benchmarks.gpu.expert_case import make_experts

PRODUCT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative, per row. Tensor cores add products of e4m3 with 13 bits behind the point of the largest
(fast accumulation), and the result is rounded."""
BLOCK_TOLERANCE = 5e-2
DIFFERENT_SHARE = 2e-3
"""Of numbers that fall on the border of two of e4m3, which a last bit of a quotient decides."""

Errors = dict[str, tuple[float, float]]


def exact_rows(num_rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """fp32 rows that e4m3 holds without rounding, with scale 1; the first is zero."""
    x = torch.randn(num_rows, size, generator=generator).to(naive.FP8).float()
    x[:, size // 2] = naive.MAX_FP8
    x[0] = 0.0
    return x


def quantize_errors(num_rows: int, size: int, dtype: torch.dtype, device: str) -> Errors:
    """The kernel against its twin; random rows on a card alone, where it rounds as torch does."""
    generator = torch.Generator().manual_seed(0)
    exact = exact_rows(num_rows, size, generator).to(dtype)
    errors = {"exact rows": _quantize_error(exact, device, 0.0)}
    wrong = torch.randn(4, size, generator=generator).to(dtype)
    wrong[0, 1], wrong[1, 0] = torch.inf, torch.nan
    values, scales = (one.cpu() for one in quantize_rows(wrong.to(device)))
    finite = (values.float() * scales).isfinite().all(1).tolist()
    errors["finite rows"] = (float(finite != [False, False, True, True]), 0.0)
    if device != "cpu":
        x = torch.randn(num_rows, size + 8, generator=generator).to(dtype)[:, :size]
        errors["random rows"] = _quantize_error(x, device, DIFFERENT_SHARE)
    return errors


def _quantize_error(x: torch.Tensor, device: str, tolerance: float) -> tuple[float, float]:
    """Share of numbers that differ from the twin's; a scale that differs counts as infinite."""
    values, scales = (one.cpu() for one in quantize_rows(x.to(device)))
    right_values, right_scales = naive.quantize_rows(x)
    if not torch.allclose(scales, right_scales, rtol=1e-6, atol=0.0):
        return torch.inf, tolerance
    differ = values.view(torch.uint8) != right_values.view(torch.uint8)
    differ &= (values.float() != 0.0) | (right_values.float() != 0.0)  # -0 is 0
    return float(differ.float().mean()), tolerance


def linear_errors(num_rows: int, in_features: int, out_features: int, device: str) -> Errors:
    """Quantising and torch's product, in bf16, with and without a bias; on a card alone."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, in_features, generator=generator).bfloat16()
    full = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    weight, scales = naive.quantize_rows(full)
    bias = torch.randn(out_features, generator=generator).bfloat16()
    there = x.to(device), weight.to(device), scales.to(device)
    tolerance = PRODUCT_TOLERANCE[torch.bfloat16]
    plain, biased = fp8_linear(*there), fp8_linear(*there, bias.to(device))
    return {
        "product": (relative_error(plain, naive.fp8_linear(x, weight, scales)), tolerance),
        "biased": (relative_error(biased, naive.fp8_linear(x, weight, scales, bias)), tolerance),
    }


def expert_errors(
    num_tokens: int,
    num_experts: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: str,
    *,
    tile: ProductTile | None = None,
) -> Errors:
    """The product over experts with rows and weights in e4m3."""
    generator = torch.Generator().manual_seed(2)
    _, experts = make_experts(num_tokens, num_experts, 2, generator)
    x = exact_rows(num_tokens, in_features, generator).to(naive.FP8)
    weight = torch.randn(num_experts, out_features, in_features, generator=generator)
    weight = weight.to(naive.FP8)
    x_scales = torch.rand(num_tokens, 1, generator=generator) / in_features
    w_scales = torch.rand(num_experts, out_features, generator=generator)
    pairs, starts = naive_experts.sort_by_expert(experts, num_experts)
    rows = sort_by_expert(experts.to(device), num_experts)
    out = torch.full((len(pairs), out_features), torch.nan, dtype=dtype, device=device)
    expert_product(
        x.to(device), weight.to(device), rows, out, top_k=2, tile=tile,
        scales=(x_scales.to(device), w_scales.to(device)),
    )  # fmt: skip
    right = naive_experts.expert_product(
        (x.double() * x_scales)[pairs.long() // 2], weight.double() * w_scales[:, :, None], starts
    )
    errors = {"scaled product": (relative_error(out, right), PRODUCT_TOLERANCE[dtype])}
    if device != "cpu":  # the interpreter rounds wrongly to e4m3
        errors["block"] = _block_error(num_tokens, num_experts, in_features, out_features, device)
    return errors


def _block_error(
    num_tokens: int, num_experts: int, hidden_size: int, width: int, device: str
) -> tuple[float, float]:
    """The whole feed-forward block in bf16 against its parts by twins, expert by expert.

    Inner numbers may be rounded to neighbours in bf16 first, and then in e4m3, hence the tolerance.
    """
    generator = torch.Generator().manual_seed(3)
    weights, experts = make_experts(num_tokens, num_experts, 2, generator)
    x = torch.randn(num_tokens, hidden_size, generator=generator).bfloat16()
    ups, downs = (
        [
            naive.quantize_rows(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
            for _ in range(num_experts)
        ]
        for shape in ((2 * width, hidden_size), (hidden_size, width))
    )
    outputs = x.new_empty(num_tokens, 2, hidden_size)
    for expert in range(num_experts):
        tokens, ranks = (experts == expert).nonzero(as_tuple=True)
        if len(tokens):
            both = naive.fp8_linear(x[tokens], *ups[expert])
            inner = gated_activation(both.float(), "silu").bfloat16()
            outputs[tokens, ranks] = naive.fp8_linear(inner, *downs[expert])
    stacked = [torch.stack([one[0] for one in many]).to(device) for many in (ups, downs)]
    scales = [torch.stack([one[1][:, 0] for one in many]).to(device) for many in (ups, downs)]
    out = expert_mlp(
        x.to(device),
        experts.to(device),
        weights.to(device),
        *stacked,
        scales=(scales[0], scales[1]),
    )
    return relative_error(out, naive_experts.sum_ranks(outputs, weights)), BLOCK_TOLERANCE
