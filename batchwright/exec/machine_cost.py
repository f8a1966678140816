"""machine_cost: what a model costs on this machine, measured when it is asked for."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from batchwright import techniques
from batchwright.attention.backend import AttentionBackend
from batchwright.config import ResolvedConfig
from batchwright.exec import calibrate
from batchwright.exec.build import use_threads
from batchwright.exec.device.kv_memory import element_bytes
from batchwright.exec.layer_slice import NUM_LAYERS
from batchwright.plan.cost import CostModel
from batchwright.plan.exchange import with_exchange
from batchwright.plan.hardware import DEVICES, device_hardware, find_device
from batchwright.plan.shape import ModelShape
from batchwright.tensor_parallel.measure_link import measure_link
from batchwright.weights.block_tensor import FORM_BYTES
from batchwright.weights.forms import StoredForms

logger = logging.getLogger(__name__)

CALIBRATION_S = 3.0
"""What measuring takes of a machine that nobody else uses, besides steps of a large model."""

STEPS_TOKENS = 2500
"""Tokens of all steps in which it is measured."""

QUICK_FLOPS_PER_S = 1e11
"""What a thread of a fast processor reaches in fp32."""

GPU_FLOPS_PER_S = 1e15
"""What a fast card reaches in bf16."""


def machine_cost(
    model_config: Mapping[str, Any],
    shape: ModelShape,
    config: ResolvedConfig,
    forms: StoredForms,
) -> CostModel:
    """Measure a model on this machine, with the threads, number formats and attention of `config`.

    Args:
        model_config: its config.json.
        forms: how its fp32 weights are stored.
    """
    if config.device == "cuda":
        return _gpu_cost(shape, config)
    # Ranks and replicas are pretended to be threads; what ranks send to each other is added.
    num_cores = len(os.sched_getaffinity(0))
    num_processes = config.tensor_parallel_size * config.data_parallel_size
    num_threads = min(config.num_threads * num_processes, num_cores)
    use_threads(num_threads)
    dtype: torch.dtype = getattr(torch, config.dtype)
    hardware = calibrate.calibrate(
        model_config,
        shape,
        dtype=dtype,
        attention=config.attention,
        num_threads=num_threads,
        quantize=config.quantize,
        forms=forms,
    )
    use_threads(config.num_threads)
    if (num_ranks := config.tensor_parallel_size) > 1:
        link = measure_link(num_ranks, shape.hidden_size, dtype)
        hardware = with_exchange(hardware, shape, link, num_ranks, dtype.itemsize)
    backend: AttentionBackend = techniques.find("attention.backends", config.attention).Backend()
    heads = shape.attention[0]
    return CostModel(
        shape,
        hardware,
        _bytes_per_weight(dtype, config, forms),
        backend.element_bytes(dtype, heads.head_dim),
        backend.rows_per_load(heads.num_q_heads, heads.num_kv_heads),
    )


def _bytes_per_weight(dtype: torch.dtype, config: ResolvedConfig, forms: StoredForms) -> float:
    if config.quantize:
        return 1.0
    return FORM_BYTES[forms.layers] if dtype == torch.float32 else float(dtype.itemsize)


def _gpu_cost(shape: ModelShape, config: ResolvedConfig) -> CostModel:
    """By the profile of the card; nothing is measured. A card that has none counts as an A100."""
    name = torch.cuda.get_device_name()
    known = [profile for profile in DEVICES.values() if profile.name.split("-")[0] in name]
    profile = known[0] if known else find_device("A100-80G")
    if not known:
        logger.info("no profile of %s: orders are tried as on an %s", name, profile.name)
    itemsize = getattr(torch, config.dtype).itemsize
    is_fp8 = config.quantize == "fp8"
    hardware = device_hardware(
        profile, shape, itemsize, num_devices=config.tensor_parallel_size, fp8=is_fp8
    )
    dtype, head_dim = getattr(torch, config.dtype), shape.attention[0].head_dim
    kv_bytes = element_bytes(config.kv_cache_dtype, dtype, head_dim)
    return CostModel(shape, hardware, 1 if is_fp8 else itemsize, kv_bytes, 16, config.block_size)


def with_useful_swap(config: ResolvedConfig, shape: ModelShape) -> ResolvedConfig:
    """The settings without room on the host if blocks are sooner computed again than copied."""
    if not config.swap_space_bytes or _gpu_cost(shape, config).swap_pays:
        return config
    logger.info("keys and values are sooner computed again than copied to the host: none are")
    return dataclasses.replace(config, swap_space_bytes=0)


def calibration_s(shape: ModelShape, num_threads: int) -> float:
    """About what `machine_cost` takes on a CPU."""
    share = min(1.0, NUM_LAYERS / shape.num_layers)
    flops = STEPS_TOKENS * share * shape.layer_flops_per_token
    return CALIBRATION_S + 2 * flops / (QUICK_FLOPS_PER_S * num_threads)


def least_token_s(shape: ModelShape, num_threads: int, *, on_gpu: bool = False) -> float:
    """Less than what a token takes, on most machines."""
    if on_gpu:
        return shape.layer_flops_per_token / GPU_FLOPS_PER_S
    return shape.layer_flops_per_token / (QUICK_FLOPS_PER_S * num_threads)
