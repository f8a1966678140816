"""A GGUF file seen as a Hugging Face checkpoint: its config, its names, its values in fp32."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.weights.dequantize import SUPPORTED_TYPES, dequantize, unsupported_type
from batchwright.weights.gguf import GgufFile, read_gguf
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
        source = self._sources.get(name)
        if source is None:
            raise ModelFormatError(f"{self.path}: there is no tensor for {name!r} in this file")
        info, raw = self.gguf.tensors[source.gguf_name], self.gguf.raw(source.gguf_name)
        shape = info.shape
        if source.expert is not None:
            raw = raw.reshape(shape[0], -1)[source.expert]
            shape = shape[1:]
        values = dequantize(raw, info.ggml_type, shape)
        if source.undo is not None:
            values = source.undo(values)
        return torch.from_numpy(values)

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
