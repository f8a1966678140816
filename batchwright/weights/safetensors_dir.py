"""A Hugging Face directory: config.json, generation_config.json and *.safetensors, mapped lazily.

Pickle files (pytorch_model.bin and its kin) are never opened: loading one runs code
(CVE-2025-32434).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from batchwright.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from batchwright.weights.safetensors_file import open_safetensors, read_tensor

MAX_JSON_BYTES = 64 << 20  # the largest real index, of a model with 90,000 tensors, has 9 MB
INDEX_NAME = "model.safetensors.index.json"
SAMPLE_BYTES = 4096
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """See `Checkpoint`. Tensors are views of mapped files, in their stored dtype."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    _files: dict[str, tuple[Path, Any]] = field(repr=False)  # tensor name -> file, its open handle

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of its mapped file (writing to it changes no file).

        Raises:
            ModelFormatError: no file has such a tensor.
            UnsupportedModelError: it is not stored as F32, F16 or BF16.
        """
        if name not in self._files:
            raise ModelFormatError(
                f"{self.path}: there is no tensor {name!r} in its safetensors files; "
                "the download is incomplete or the model is of another kind"
            )
        path, handle = self._files[name]
        return read_tensor(handle, path, name)

    def stored(self, name: str) -> torch.Tensor:
        """See `Checkpoint`: the same as `tensor`."""
        return self.tensor(name)

    def form(self, name: str) -> str:
        """See `Checkpoint`."""
        dtype = self._files[name][1].get_slice(name).get_dtype()
        return {"F16": "fp16", "BF16": "bf16"}.get(dtype, "fp32")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that `tensor(name)` has, without reading it."""
        return tuple(self._files[name][1].get_slice(name).get_shape())

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that identify the content, the same for every copy of the directory.

        SHA-256 of the config and, for every tensor, its name, dtype, shape and three 4 KiB samples
        (start, middle, end). An edit that leaves all samples alone goes unseen.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in self.names():
            handle = self._files[name][1]
            part = handle.get_slice(name)
            digest.update(f"{name} {part.get_dtype()} {part.get_shape()}\n".encode())
            raw = handle.get_tensor(name).reshape(-1).view(torch.uint8)
            for start in (0, (raw.numel() - SAMPLE_BYTES) // 2, raw.numel() - SAMPLE_BYTES):
                sample = raw[max(0, start) : max(0, start) + SAMPLE_BYTES]
                digest.update(sample.numpy().data)
        return digest.hexdigest()[:32]


def open_safetensors_dir(path: Path) -> SafetensorsCheckpoint:
    """Open a Hugging Face directory; headers are read, tensors are not.

    Which files: those named by the index if there is one, else model.safetensors, else every
    *.safetensors but adapters.

    Raises:
        ModelNotFoundError: no directory, no config.json or no weights.
        UnsupportedModelError: the weights are pickled or quantised.
        ModelFormatError: a file is damaged, missing, or names one outside the directory.
    """
    path = Path(path)
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ModelNotFoundError(
            f"{path}: there is no config.json; give a Hugging Face model directory or a .gguf file"
        )
    config = read_json_object(config_path)
    if config.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"{path}: unsupported: quantised safetensors (quantization_config in config.json); "
            "supported: F32, F16 and BF16 safetensors, and GGUF"
        )
    generation_path = path / "generation_config.json"
    generation_config = read_json_object(generation_path) if generation_path.is_file() else {}
    index_path = path / INDEX_NAME
    files = _open_indexed(path, index_path) if index_path.is_file() else _open_all(path)
    return SafetensorsCheckpoint(path, config, generation_config, files)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ModelFormatError: it is too large, not JSON, or not an object.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ModelFormatError(f"{path}: {size} bytes of JSON, the limit is {MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(
            f"{path}: not valid JSON: {error}; the file is damaged, fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def _open_indexed(path: Path, index_path: Path) -> dict[str, tuple[Path, Any]]:
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(
            f"{index_path}: has no weight_map; the file is damaged, fetch it again"
        )
    handles: dict[str, tuple[Any, set[str]]] = {}
    files: dict[str, tuple[Path, Any]] = {}
    for tensor_name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_plain_name(file_name):
            raise ModelFormatError(
                f"{index_path}: weight_map puts {tensor_name[:80]!r} in {str(file_name)[:80]!r}, "
                "expected the name of a .safetensors file in the same directory"
            )
        if file_name not in handles:
            handle = open_safetensors(path / file_name)
            handles[file_name] = handle, set(handle.keys())
        handle, names = handles[file_name]
        if tensor_name not in names:
            raise ModelFormatError(
                f"{path / file_name}: has no tensor {tensor_name[:80]!r}, which {INDEX_NAME} puts "
                "there; the files do not belong together, fetch the model again"
            )
        files[tensor_name] = path / file_name, handle
    return files


def _is_plain_name(name: str) -> bool:
    """Tell whether a name is that of a safetensors file, free of any directory part."""
    is_bare = not any(character in name for character in "/\\:\0")
    return is_bare and name.endswith(".safetensors") and name != ".safetensors"


def _open_all(path: Path) -> dict[str, tuple[Path, Any]]:
    single = path / "model.safetensors"
    found = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    found = [file for file in found if not file.name.startswith("adapter_model")]
    if not found:
        raise _no_weights(path)
    files: dict[str, tuple[Path, Any]] = {}
    for file in found:
        handle = open_safetensors(file)
        for name in handle.keys():  # noqa: SIM118  a handle is no dict
            if name in files:
                raise ModelFormatError(
                    f"{path}: tensor {name[:80]!r} is in {files[name][0].name} and in {file.name}; "
                    f"remove one of them or add {INDEX_NAME}"
                )
            files[name] = file, handle
    return files


def _no_weights(path: Path) -> ModelNotFoundError | UnsupportedModelError:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if not pickles:
        return ModelNotFoundError(
            f"{path}: has a config.json but no *.safetensors; fetch the weights too"
        )
    return UnsupportedModelError(
        f"{path}: unsupported: pickled weights ({pickles[0]}), which can run any code when loaded; "
        "supported: safetensors and GGUF; if you trust the file, convert it with transformers: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
    )
