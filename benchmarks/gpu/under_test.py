"""The engine that the sections `parity` and `engine` run: on the card, or tiny on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from batchwright.config import EngineConfig
from batchwright.engine import Engine
from batchwright.exec.device.build import build_device_executor
from batchwright.exec.device.executor import DeviceExecutor
from batchwright.exec.device.memory import free_bytes
from batchwright.models.causal_lm import CausalLM
from batchwright.models.layers import Linear
from batchwright.models.loader import build_empty
from batchwright.plan.orders.fcfs import fcfs
from batchwright.sched.scheduler import Scheduler

DRY_KV_BYTES = 64 << 20


class NoText:
    """Stands in for a tokenizer where only token ids matter."""

    end_token_ids = ()

    def decode(self, ids: Sequence[int], **options: object) -> str:
        return ""


def random_model(
    config: dict[str, Any],
    dtype: torch.dtype,
    device: str,
    length: int,
    *,
    quantize: str | None = None,
) -> CausalLM:
    """A model of random weights, so small that activations stay in range, made on the device.

    quantize: "fp8": products of the layers have such weights.
    """
    model = build_empty(config, length)
    model.dtype = dtype
    torch.manual_seed(0)
    head = model.get_submodule("lm_head")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            if value.ndim == 1:  # norms, biases
                value.fill_(0.0 if name == "bias" else 1.0)
            else:
                value.normal_(0.0, 0.02)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        if quantize and isinstance(module, Linear) and module is not head:
            module.quantize_fp8()
    assert isinstance(head, Linear)
    if model.config["tie_word_embeddings"]:
        head.weight = model.get_parameter("model.embed_tokens.weight")
    return model.eval()


def make_engine(
    model: CausalLM, device: str, **settings: Any
) -> tuple[Engine, DeviceExecutor, dict[str, Any]]:
    """An engine around a model that is on the device: (it, its executor, what was settled)."""
    on_gpu = device != "cpu"
    dtype = model.dtype
    kv_bytes = None if on_gpu else DRY_KV_BYTES
    config = EngineConfig(
        device="cuda" if on_gpu else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        **{"look_ahead": 1, "kv_cache_bytes": kv_bytes, **settings},
    )
    resolved = config.resolve(
        context_length=model.config["max_position_embeddings"],
        free_memory_bytes=free_bytes() if on_gpu else DRY_KV_BYTES,
        num_gpus=int(on_gpu),
    )
    vocab_size = model.config["vocab_size"]
    executor, groups, resolved = build_device_executor(model, resolved, vocab_size=vocab_size)
    scheduler = Scheduler(
        groups,
        block_size=resolved.block_size,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_model_len=resolved.max_model_len,
        prefix_sharing=resolved.prefix_sharing,
        order=fcfs,
    )
    engine = Engine(
        scheduler,
        executor,
        NoText(),  # type: ignore[arg-type]
        max_model_len=resolved.max_model_len,
        vocab_size=vocab_size,
        look_ahead=resolved.look_ahead,
    )
    about = {
        "dtype": resolved.dtype,
        "block_size": resolved.block_size,
        "max_num_seqs": resolved.max_num_seqs,
        "max_num_batched_tokens": resolved.max_num_batched_tokens,
        "max_model_len": resolved.max_model_len,
        "look_ahead": resolved.look_ahead,
        "kv_tokens": [group.num_blocks * resolved.block_size for group in groups],
        "kv_bytes": resolved.kv_cache_bytes,
    }
    return engine, executor, about
