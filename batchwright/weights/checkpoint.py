"""One way to read a model's config and weights, wherever they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from batchwright.errors import ModelNotFoundError
from batchwright.weights.block_tensor import BlockTensor
from batchwright.weights.gguf_checkpoint import open_gguf_checkpoint
from batchwright.weights.safetensors_dir import open_safetensors_dir


class Checkpoint(Protocol):
    """A model on disk, in Hugging Face's names. Opening one reads headers only."""

    @property
    def path(self) -> Path:
        """The directory or .gguf file."""

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds, unchanged; see `text_config`."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """What generation_config.json holds; {} if there is none."""

    @property
    def fingerprint(self) -> str:
        """32 hex digits that identify the content, the same for every copy of it."""

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it; the name must be one of `names()`."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor in its stored dtype, or fp32 from GGUF; it may be a view of a file.

        Raises:
            ModelFormatError: there is no such tensor.
        """

    def stored(self, name: str) -> torch.Tensor | BlockTensor:
        """Return a tensor as narrow as it is stored, with the values of `tensor(name)`."""

    def form(self, name: str) -> str:
        """Return how `stored(name)` is stored, without reading it: a key of FORM_BYTES."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face directory or a .gguf file.

    Raises:
        ModelNotFoundError: there is nothing at path.
        ModelFormatError: the files are damaged.
        UnsupportedModelError: they are of a kind that cannot be run.
    """
    path = Path(path)
    if path.is_dir():
        return open_safetensors_dir(path)
    if not path.is_file():
        raise ModelNotFoundError(
            f"{path}: there is no such file or directory; give a Hugging Face model directory or a "
            ".gguf file"
        )
    return open_gguf_checkpoint(path)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a config: its text_config over the outer keys, if any."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    outer = {key: value for key, value in config.items() if key != "text_config"}
    return outer | inner
