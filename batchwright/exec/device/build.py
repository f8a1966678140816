"""A DeviceExecutor for a model that is on the device, with all the memory that is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch

from batchwright.attention.backend import block_bytes
from batchwright.attention.spec import AttentionSpec
from batchwright.config import ResolvedConfig
from batchwright.exec.device.executor import DeviceExecutor
from batchwright.exec.device.graphs import CudaGraphs, Graphs, Rerun
from batchwright.exec.device.kv_memory import element_bytes
from batchwright.exec.device.memory import StepMemory
from batchwright.kv.groups import KVGroup, windows_of_layers
from batchwright.models.causal_lm import CausalLM
from batchwright.models.moe import SparseMoE
from batchwright.tensor_parallel.ranks import Ranks


def build_device_executor(
    model: CausalLM,
    config: ResolvedConfig,
    *,
    vocab_size: int,
    measure: bool = True,
    ranks: Ranks | None = None,
) -> tuple[DeviceExecutor, list[KVGroup], ResolvedConfig]:
    """The executor, its KV groups, and the config with the memory that they take.

    Args:
        model: on the device.
        measure: on a GPU, run the largest step and give keys and values what it leaves; False:
            they get config.kv_cache_bytes.
        ranks: those that have the model together; all call this, and get the same groups.
    """
    on_gpu = next(model.parameters()).is_cuda
    specs = model.attention_specs
    windows, group_of_layer = windows_of_layers([spec.window for spec in specs])
    of_head = partial(element_bytes, config.kv_cache_dtype, getattr(torch, config.dtype))
    sizes = bytes_of_blocks(specs, group_of_layer, config, of_head)
    if on_gpu:
        for module in model.modules():
            if isinstance(module, SparseMoE):
                module.stack()
    graphs: Graphs = CudaGraphs() if on_gpu else Rerun()
    measures = measure and on_gpu
    # The host's blocks are there from the start, for their buffers take memory of the device.
    num_host_blocks = config.num_host_blocks(windows, sizes)
    first = [KVGroup(window, 2, num_host_blocks) for window in windows]
    groups = first if measures else config.kv_groups(windows, sizes)
    executor = DeviceExecutor(
        model,
        groups,
        group_of_layer,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        vocab_size=vocab_size,
        graphs=graphs,
        share_prefixes=config.prefix_sharing,
        kv_cache_dtype=config.kv_cache_dtype,
        ranks=ranks,
    )
    if measures:
        with StepMemory() as memory:
            executor.run_largest(
                config.max_num_batched_tokens, config.max_num_seqs, config.max_model_len
            )
        left = min(memory.left_bytes, config.kv_cache_bytes)
        if ranks is not None:
            left = ranks.least(left)
        config = dataclasses.replace(config, kv_cache_bytes=left)
        groups = config.kv_groups(windows, sizes)
        executor.allocate(groups)
        executor.capture_decoding()
    return executor, groups, config


def bytes_of_blocks(
    specs: Sequence[AttentionSpec],
    group_of_layer: Sequence[int],
    config: ResolvedConfig,
    element_bytes: Callable[[int], float],
) -> list[int]:
    """Bytes of one block in all layers of each KV group.

    Args:
        element_bytes: of a component of keys and values, by head_dim.
    """
    totals = [0] * (max(group_of_layer) + 1)
    for spec, group in zip(specs, group_of_layer, strict=True):
        totals[group] += block_bytes(spec, config.block_size, element_bytes(spec.head_dim))
    return totals
