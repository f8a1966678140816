"""A GGUF file seen as a Hugging Face checkpoint: its config, its names, its values in fp32."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.weights.block_tensor import BlockTensor
from batchwright.weights.dequantize import (
    SUPPORTED_TYPES,
    Uint8Array,
    dequantize,
    read_blocks,
    stored_form,
    unsupported_type,
)
from batchwright.weights.gguf import GgufFile, GgufTensorInfo, read_gguf
from batchwright.weights.gguf_config import config_from_gguf, generation_config_from_gguf
from batchwright.weights.gguf_names import TensorSource, map_names

SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class GgufCheckpoint:
    """See `Checkpoint`. Tensors are dequantised anew at each call, so keep what you need."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    gguf: GgufFile = field(repr=False)
    _sources: dict[str, TensorSource] = field(repr=False)

    def names(self) -> list[str]:
        """Return the Hugging Face names of all tensors, sorted."""
        return sorted(self._sources)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor by its Hugging Face name, dequantised to a new fp32 tensor.

        Raises:
            ModelFormatError: the file has no such tensor.
        """
        source, info, raw, shape = self._find(name)
        values = dequantize(raw, info.ggml_type, shape)
        if source.reorder is not None:
            values = source.reorder(values)
        if source.undo is not None:
            values = source.undo(values)
        return torch.from_numpy(values)

    def stored(self, name: str) -> torch.Tensor | BlockTensor:
        """Return a tensor as narrow as the file has it: fp16, bf16, integers with scales, or fp32.

        Raises: as `tensor`, whose values are those of the result.
        """
        source, info, raw, shape = self._find(name)
        kind = info.ggml_type
        if source.undo is not None:
            return self.tensor(name)
        form = stored_form(kind)
        if form.startswith("int") and len(shape) == 2:
            blocks = read_blocks(raw, kind, (shape[0], shape[1]))
            return blocks if source.reorder is None else blocks.reorder(source.reorder)
        if form in ("fp16", "bf16"):
            bits = np.ascontiguousarray(raw).view("<u2").reshape(shape)
            bits = bits.copy() if source.reorder is None else source.reorder(bits)
            dtype = torch.float16 if form == "fp16" else torch.bfloat16
            return torch.from_numpy(bits).view(dtype)
        return self.tensor(name)

    def form(self, name: str) -> str:
        """See `Checkpoint`."""
        source = self._sources[name]
        kind = self.gguf.tensors[source.gguf_name].ggml_type
        if source.undo is not None or len(self.shape(name)) != 2:
            return "fp32"
        return stored_form(kind)

    def _find(self, name: str) -> tuple[TensorSource, GgufTensorInfo, Uint8Array, tuple[int, ...]]:
        """(source, what the header says, stored bytes, stored shape), of one expert if it is one.

        Raises:
            ModelFormatError: the file has no such tensor.
        """
        source = self._sources.get(name)
        if source is None:
            raise ModelFormatError(f"{self.path}: there is no tensor for {name!r} in this file")
        info, raw = self.gguf.tensors[source.gguf_name], self.gguf.raw(source.gguf_name)
        if source.expert is None:
            return source, info, raw, info.shape
        return source, info, raw.reshape(info.shape[0], -1)[source.expert], info.shape[1:]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that `tensor(name)` has, without reading it."""
        source = self._sources[name]
        return source.shape(self.gguf.tensors[source.gguf_name].shape)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that identify the file's content, the same for every copy of it.

        SHA-256 of the size, the whole header, and three 4 KiB samples (start, middle, end) of every
        tensor. An edit that leaves the header and all samples alone goes unseen; none of the usual
        ones (another quantisation, fine-tuning, merging) does that.
        """
        digest = hashlib.sha256(b"gguf %d\n" % self.gguf.nbytes)
        digest.update(self.gguf.header().data)
        for name in self.gguf.tensors:
            raw = self.gguf.raw(name)
            for start in (0, (raw.size - SAMPLE_BYTES) // 2, raw.size - SAMPLE_BYTES):
                digest.update(raw[max(0, start) : max(0, start) + SAMPLE_BYTES].data)
        return digest.hexdigest()[:32]


def open_gguf_checkpoint(path: Path) -> GgufCheckpoint:
    """Open a GGUF file as a checkpoint; no tensor is read yet.

    Raises:
        ModelNotFoundError, ModelFormatError, UnsupportedModelError: see `read_gguf`,
            `config_from_gguf` and `map_names`. A tensor type that cannot be dequantised is reported
            here, not at its first use.
    """
    gguf = read_gguf(path)
    config = config_from_gguf(gguf)
    for info in gguf.tensors.values():
        if info.ggml_type.name not in SUPPORTED_TYPES:
            raise UnsupportedModelError(f"{path}: {unsupported_type(info.ggml_type)}")
    num_q_heads = config.get("num_attention_heads") or config["n_head"]
    sources = map_names(
        gguf.path,
        gguf.metadata["general.architecture"],
        {name: info.shape for name, info in gguf.tensors.items()},
        num_q_heads,
        config.get("num_key_value_heads", num_q_heads),
    )
    generation_config = generation_config_from_gguf(gguf, config)
    return GgufCheckpoint(gguf.path, config, generation_config, gguf, sources)
