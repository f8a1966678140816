"""A model as far as its small files tell: config, tokenizer, sizes. No weights are read."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batchwright import techniques
from batchwright.attention.backend import AttentionBackend
from batchwright.config import EngineConfig, ResolvedConfig
from batchwright.errors import ConfigError
from batchwright.exec.device.formats import check_formats
from batchwright.exec.device.kv_memory import element_bytes
from batchwright.exec.device.memory import free_bytes, has_gpu, num_gpus
from batchwright.exec.machine_cost import with_useful_swap
from batchwright.exec.memory import available_memory_bytes
from batchwright.kernels.int8_linear.numba import activation_bits
from batchwright.kv.groups import KVGroup
from batchwright.models.loader import build_empty, read_config
from batchwright.models.shape import read_shape
from batchwright.plan.shape import ModelShape
from batchwright.request import DEFAULT_MAX_TOKENS
from batchwright.tensor_parallel.sharding import check_divisible
from batchwright.text.tokenizer import Tokenizer, load_tokenizer
from batchwright.weights.checkpoint import Checkpoint, open_checkpoint
from batchwright.weights.forms import stored_bytes
from batchwright.weights.locate import locate_model

GPU_KV_SHARE = 0.9
"""Of a card's memory beside the weights, that keys and values will probably get."""


@dataclass(frozen=True)
class OpenedModel:
    """What can be said about running a model before it is loaded.

    Attributes:
        path: its directory or .gguf file.
        config: the engine's settings, settled.
        model_config: as `models.loader.read_config` returns it.
        groups: KV groups with the pool sizes that the engine, or each replica, will have.
        kv_element_bytes: that a component of a key or value takes.
        free_memory_bytes: when it was opened.
    """

    path: Path
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    config: ResolvedConfig
    model_config: dict[str, Any]
    shape: ModelShape
    groups: list[KVGroup]
    kv_element_bytes: float
    free_memory_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        found: torch.dtype = getattr(torch, self.config.dtype)
        return found

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take, in all processes together."""
        shape, config = self.shape, self.model_config
        if self.config.quantize is None:
            if self.dtype == torch.float32 and self.config.device == "cpu":
                return stored_bytes(self.checkpoint)
            return shape.num_params * self.dtype.itemsize
        is_tied = bool(config["tie_word_embeddings"])
        if self.config.quantize == "fp8":
            return _fp8_bytes(shape, is_tied)
        # A byte each; an embedding table in fp32 besides, where it is the output head's too.
        table = shape.vocab_size * shape.hidden_size
        return shape.num_params - (0 if is_tied else table) + self.dtype.itemsize * table

    def identity(self) -> dict[str, Any]:
        """What answers depend on besides the rows; see `answer_identity`."""
        return answer_identity(self.checkpoint.fingerprint, self.tokenizer, self.config)


def _fp8_bytes(shape: ModelShape, is_tied: bool) -> int:
    """Weights of a byte each, but for embeddings and output head, which are bf16."""
    return shape.num_params + (1 if is_tied else 2) * shape.vocab_size * shape.hidden_size


def open_model(model: str, settings: dict[str, Any]) -> OpenedModel:
    """Open a model and settle the engine's settings.

    Args:
        model: as for `LLM`.
        settings: fields of EngineConfig.
    Raises:
        ConfigError, ModelError: it cannot be run, or not with these settings.
    """
    engine_config = engine_settings(settings)
    path = locate_model(model)
    tokenizer, checkpoint = load_tokenizer(path), open_checkpoint(path)
    model_config = read_config(checkpoint.config)
    shape, size = read_shape(checkpoint.config), engine_config.tensor_parallel_size
    if size > 1:
        check_divisible(build_empty(checkpoint.config, 1), size)
    free_memory_bytes = available_memory_bytes()
    if engine_config.uses_gpu(has_gpu()):  # about: the engine measures what a step takes
        weight_bytes = shape.num_params * (4 if engine_config.dtype == "float32" else 2)
        if engine_config.quantize == "fp8":
            weight_bytes = _fp8_bytes(shape, bool(model_config["tie_word_embeddings"]))
        free_memory_bytes = int(GPU_KV_SHARE * (free_bytes() - weight_bytes / size))
    config = engine_config.resolve(
        context_length=model_config["max_position_embeddings"],
        free_memory_bytes=free_memory_bytes,
        num_gpus=num_gpus(),
    )
    check_formats(checkpoint.config, config)
    config = with_useful_swap(config, shape)
    return OpenedModel(
        path=path,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        config=config,
        model_config=model_config,
        shape=shape,
        groups=kv_groups(config, shape),
        kv_element_bytes=_kv_element_bytes(config, shape),
        free_memory_bytes=free_memory_bytes,
    )


def kv_groups(config: ResolvedConfig, shape: ModelShape) -> list[KVGroup]:
    """KV groups with the pool sizes that an engine has, one of several replicas too.

    Raises:
        ConfigError: memory does not hold two blocks of every group.
    """
    element_bytes, size = _kv_element_bytes(config, shape), config.tensor_parallel_size
    return config.kv_groups(
        [one.window for one in shape.attention],
        [
            round(one.kv_elements // size * config.block_size * element_bytes)
            for one in shape.attention
        ],
    )


def _kv_element_bytes(config: ResolvedConfig, shape: ModelShape) -> float:
    dtype: torch.dtype = getattr(torch, config.dtype)
    if config.device != "cpu":
        return element_bytes(config.kv_cache_dtype, dtype, shape.attention[0].head_dim)
    backend: AttentionBackend = techniques.find("attention.backends", config.attention).Backend()
    return backend.element_bytes(dtype, shape.attention[0].head_dim)


def engine_settings(settings: dict[str, Any]) -> EngineConfig:
    """The settings as an EngineConfig.

    Raises:
        ConfigError: there is no setting of a name, or a value that no model makes right.
    """
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    if unknown := sorted(settings.keys() - fields):
        raise ConfigError(f"unknown settings: {', '.join(unknown)}; known: {sorted(fields)}")
    config = EngineConfig(**settings)
    config.check()
    return config


def answer_identity(
    fingerprint: str, tokenizer: Tokenizer, config: ResolvedConfig
) -> dict[str, Any]:
    """What answers depend on besides the rows: a job that goes on must have the same.

    Settings of device, batch and schedule change no answer beyond rounding and are not in it.
    """
    backend = hashlib.blake2b(tokenizer.backend.to_str().encode(), digest_size=16)
    template = hashlib.blake2b(repr(tokenizer.chat_template).encode(), digest_size=16)
    return {
        "model": fingerprint,
        "tokenizer": backend.hexdigest(),
        "chat_template": template.hexdigest(),
        "dtype": config.dtype,
        **_quantisation(config),
        **_kv_rounding(config),
        **_division(config),
        "max_model_len": config.max_model_len,
        "seed": config.seed,
        "default_max_tokens": DEFAULT_MAX_TOKENS,
    }


def _division(config: ResolvedConfig) -> dict[str, Any]:
    """Where bits are promised, on a CPU, they are those of one number of ranks; a job without ranks
    has no such entry. On GPUs it is not in it: a job may go on with fewer cards."""
    if config.device == "cuda" or config.tensor_parallel_size == 1:
        return {}
    return {"tensor_parallel_size": config.tensor_parallel_size}


def _kv_rounding(config: ResolvedConfig) -> dict[str, Any]:
    """Jobs without any have no such entry."""
    dtype = config.kv_cache_dtype
    if dtype == "auto" or (config.device == "cuda" and dtype == config.dtype):
        return {}
    return {"kv_cache_dtype": dtype}


def _quantisation(config: ResolvedConfig) -> dict[str, Any]:
    """Jobs without any have no such entry."""
    if config.quantize is None:
        return {}
    if config.quantize == "fp8":
        return {"quantize": "fp8"}
    return {"quantize": config.quantize, "activation_bits": activation_bits()}
