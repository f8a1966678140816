"""A model without weights, for timing what a step spends beside its matrix products.

Every product and embedding returns numbers that mean nothing, at once; norms, rotations, attention,
activations and draws are those of the real model, in all its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from batchwright.models.causal_lm import CausalLM
from batchwright.models.layers import Embedding, Linear
from batchwright.models.loader import build_empty


def hollow_model(
    config: Mapping[str, Any], *, dtype: torch.dtype, max_positions: int, max_tokens: int
) -> CausalLM:
    """The model of a config.json, hollow.

    Args:
        max_tokens: most tokens of a step.
    """
    model = build_empty(config, max_positions)
    model.dtype = dtype
    widths = [m.out_features for m in model.modules() if isinstance(m, Linear)]
    widths += [m.weight.shape[1] for m in model.modules() if isinstance(m, Embedding)]
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(max_tokens * max(widths), generator=generator).to(dtype)
    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = partial(_numbers, numbers, module.out_features)  # type: ignore[method-assign]
        elif isinstance(module, Embedding):
            module.forward = partial(_numbers, numbers, module.weight.shape[1])  # type: ignore[method-assign]
        else:
            for name, parameter in list(module.named_parameters(recurse=False)):
                value = torch.ones(parameter.shape, dtype=dtype)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.eval()


def _numbers(numbers: torch.Tensor, width: int, x: torch.Tensor) -> torch.Tensor:
    """[num_rows, width], the same memory at every call."""
    return numbers[: x.shape[0] * width].view(x.shape[0], width)
