"""Sparse mixture of experts (arXiv:1701.06538, arXiv:2401.04088): the feed-forward block.

Each token goes to its `top_k` experts of highest router probability; the outputs are summed with
those probabilities as weights.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import nn

from batchwright.kernels.fp8_linear.naive import FP8
from batchwright.models.layers import Combine, Linear, Parallel
from batchwright.models.llama import MLP
from batchwright.tensor_parallel.ranks import Ranks

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class SparseMoE(nn.Module):
    """Router and experts.

    Args:
        hidden_size: width of a token.
        width: inner width of an expert.
        num_experts, top_k: experts there are, and experts a token uses.
        renormalise: whether the chosen probabilities are scaled to sum to one.

    Level bits: an expert's rows are computed by `Linear`, so they do not depend on which other
    tokens chose it, and a token's experts are summed in the order of its own ranks, never in the
    order of arrival.

    Divided over processes (`divide`), each has the router and a part of every expert's inner width;
    what is summed over them is the block's result, not each expert's.
    """

    def __init__(
        self, hidden_size: int, width: int, num_experts: int, top_k: int, *, renormalise: bool
    ) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, num_experts, exact=True)
        self.experts = nn.ModuleList(
            MLP(hidden_size, width, down=Parallel.SUMMAND) for _ in range(num_experts)
        )
        self._combine: Combine | None = None
        self.top_k = top_k
        self.renormalise = renormalise
        self.stacked: tuple[torch.Tensor, torch.Tensor] | None = None
        self.stacked_scales: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, hidden_size] -> the same shape and dtype; weighted and summed in fp32."""
        y = self._mixture(x)
        return y if self._combine is None else self._combine(y)

    def divide(self, ranks: Ranks) -> None:
        """Sum over processes; the experts' products are divided by their own `divide`."""
        self._combine = ranks.sum

    def _mixture(self, x: torch.Tensor) -> torch.Tensor:
        weights, experts = route(self.gate(x), self.top_k, renormalise=self.renormalise)
        if self.stacked is not None:
            return _gpu_kernel().expert_mlp(
                x, experts, weights, *self.stacked, scales=self.stacked_scales
            )
        outputs = self.outputs(x, experts).unflatten(0, experts.shape)
        total = outputs[:, 0].float() * weights[:, :1]
        for rank in range(1, self.top_k):
            total += outputs[:, rank].float() * weights[:, rank, None]
        return total.to(x.dtype)

    def stack(self) -> None:
        """Put the experts' weights into one tensor for each product, for the kernel of a GPU.

        The experts' own parameters become views of it, so nothing is held twice.
        """
        experts = [expert for expert in self.experts if isinstance(expert, MLP)]
        ups = [expert.gate_up_proj for expert in experts]
        downs = [expert.down_proj for expert in experts]
        self.stacked = _stack(ups), _stack(downs)
        if ups[0].weight.dtype == FP8:
            self.stacked_scales = _stacked_scales(ups), _stacked_scales(downs)

    def outputs(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Every (token, rank) pair through its expert: [num_tokens * top_k, hidden_size]."""
        pairs = experts.flatten()
        by_expert = pairs.argsort(stable=True)
        ends = pairs.bincount(minlength=len(self.experts)).cumsum(0).tolist()
        outputs = x.new_empty(len(pairs), x.shape[-1])
        for expert, start, end in zip(self.experts, [0, *ends], ends, strict=False):
            if start < end:
                mine = by_expert[start:end]
                outputs[mine] = expert(x[mine // self.top_k])
        return outputs


def _stack(linears: list[Linear]) -> torch.Tensor:
    weights = torch.stack([linear.weight for linear in linears])
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return weights


def _stacked_scales(linears: list[Linear]) -> torch.Tensor:
    return torch.cat([linear.scales for linear in linears], 1).T.contiguous()


@functools.cache
def _gpu_kernel() -> ModuleType:
    return importlib.import_module("batchwright.kernels.expert_product.triton")


def route(
    router_logits: torch.Tensor, top_k: int, *, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts.

    Args:
        router_logits: [num_tokens, num_experts].
    Returns:
        (weights, experts): [num_tokens, top_k] fp32 and int64, most probable first.
    """
    probabilities = router_logits.softmax(-1, dtype=torch.float32)
    weights, experts = probabilities.topk(top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def fetch_expert(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A weight that may be stacked over experts, the gate and up projections in one tensor.

    `experts.3.up_proj.weight` is the second half of row 3 of `experts.gate_up_proj`
    [num_experts, 2 * width, hidden_size] where the checkpoint has that.
    """
    match = _EXPERT.fullmatch(name)
    if match is None or name in tensors:
        return tensors[name]
    experts, index, part = match.groups()
    stacked = f"{experts}.down_proj" if part == "down" else f"{experts}.gate_up_proj"
    if stacked not in tensors:
        return tensors[name]  # reports the usual name as missing
    weight = tensors[stacked][int(index)]
    if part == "down":
        return weight
    gate, up = weight.chunk(2)
    return gate if part == "gate" else up
