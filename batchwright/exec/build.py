"""The executor of a model, and the memory it has for keys and values."""

from __future__ import annotations

from functools import partial

import torch

from batchwright import kernels, techniques
from batchwright.attention.backend import AttentionBackend
from batchwright.config import ResolvedConfig
from batchwright.exec.device.build import build_device_executor, bytes_of_blocks
from batchwright.exec.executor import Executor
from batchwright.exec.local import LocalExecutor
from batchwright.kv.groups import KVGroup, windows_of_layers
from batchwright.models.causal_lm import CausalLM
from batchwright.tensor_parallel.ranks import Ranks


def use_threads(num_threads: int) -> None:
    """How many threads kernels and torch's products have in this process."""
    kernels.set_num_threads(num_threads)
    torch.set_num_threads(num_threads)  # after the kernels': starting theirs resets it


def build_executor(
    model: CausalLM, config: ResolvedConfig, *, vocab_size: int, ranks: Ranks | None = None
) -> tuple[Executor, list[KVGroup], ResolvedConfig]:
    """The executor, its KV groups, and the config with the memory that they take.

    Args:
        model: where config.device says.
        ranks: those that have the model together. Each calls this with the same config, and gets
            the same groups.
    """
    if config.device == "cuda":
        return build_device_executor(model, config, vocab_size=vocab_size, ranks=ranks)
    backend: AttentionBackend = techniques.find("attention.backends", config.attention).Backend()
    element_bytes = partial(backend.element_bytes, getattr(torch, config.dtype))
    specs = model.attention_specs
    windows, group_of_layer = windows_of_layers([spec.window for spec in specs])
    sizes = bytes_of_blocks(specs, group_of_layer, config, element_bytes)
    groups = config.kv_groups(windows, sizes)
    executor = LocalExecutor(
        model,
        backend,
        groups,
        group_of_layer,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        vocab_size=vocab_size,
        ranks=ranks,
    )
    return executor, groups, config
