"""machine_cost: what a model costs on this machine, measured when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from batchwright import kernels, techniques
from batchwright.attention.backend import AttentionBackend
from batchwright.config import ResolvedConfig
from batchwright.exec import calibrate
from batchwright.exec.layer_slice import NUM_LAYERS
from batchwright.plan.cost import CostModel
from batchwright.plan.shape import ModelShape

CALIBRATION_S = 4.0
"""What measuring takes of a machine that nobody else uses, besides steps of a large model."""

STEPS_TOKENS = 2500
"""Tokens of all steps in which it is measured."""

QUICK_FLOPS_PER_S = 1e11
"""What a thread of a fast processor reaches in fp32."""


def machine_cost(
    model_config: Mapping[str, Any], shape: ModelShape, config: ResolvedConfig
) -> CostModel:
    """Measure a model on this machine, with the threads, dtype and attention of `config`.

    Args:
        model_config: its config.json.
    """
    kernels.set_num_threads(config.num_threads)
    torch.set_num_threads(config.num_threads)  # after the kernels': starting theirs resets it
    dtype: torch.dtype = getattr(torch, config.dtype)
    hardware = calibrate.calibrate(
        model_config,
        shape,
        dtype=dtype,
        attention=config.attention,
        num_threads=config.num_threads,
    )
    backend: AttentionBackend = techniques.find("attention.backends", config.attention).Backend()
    heads = shape.attention[0]
    return CostModel(
        shape,
        hardware,
        dtype.itemsize,
        backend.kv_dtype(dtype).itemsize,
        backend.rows_per_load(heads.num_q_heads, heads.num_kv_heads),
    )


def calibration_s(shape: ModelShape, num_threads: int) -> float:
    """About what `machine_cost` takes."""
    share = min(1.0, NUM_LAYERS / shape.num_layers)
    flops = STEPS_TOKENS * share * shape.layer_flops_per_token
    return CALIBRATION_S + 2 * flops / (QUICK_FLOPS_PER_S * num_threads)


def least_token_s(shape: ModelShape, num_threads: int) -> float:
    """Less than what a token takes, on most machines."""
    return shape.layer_flops_per_token / (QUICK_FLOPS_PER_S * num_threads)
