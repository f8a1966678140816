"""One safetensors file: opened with clear errors, or written as a stream.

The `safetensors` library bounds the header and checks that the tensors tile the file exactly;
tensors it returns are private copy-on-write views of the mapped file, so nothing is read before it
is used. Format: 8 bytes header length, JSON header (name to dtype, shape, byte range), data.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from batchwright.errors import ModelFormatError, UnsupportedModelError

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_safetensors(path: Path) -> Any:
    """Map a safetensors file; return the library's handle (keys, metadata, get_slice, get_tensor).

    Raises:
        ModelFormatError: the file is missing, truncated or its header is wrong.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelFormatError(
            f"{path}: cannot be read as safetensors: {error}; "
            "the file is damaged or incomplete, fetch it again"
        ) from error


def read_tensor(handle: Any, path: Path, name: str) -> torch.Tensor:
    """Return a tensor as a view of the mapped file, in its stored dtype.

    Raises:
        UnsupportedModelError: a dtype other than F32, F16 and BF16.
    """
    dtype = handle.get_slice(name).get_dtype()
    if dtype not in FLOAT_DTYPES:
        raise UnsupportedModelError(
            f"{path}: unsupported: tensor {name!r} of dtype {dtype}; supported: "
            f"{', '.join(FLOAT_DTYPES)}; save the model unquantised in one of these"
        )
    tensor: torch.Tensor = handle.get_tensor(name)
    return tensor


def stored_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return how many bytes of data fp32 tensors of these shapes take."""
    return sum(4 * math.prod(shape) for shape in shapes.values())


def write_safetensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    tensor: Callable[[str], torch.Tensor],
    metadata: dict[str, str],
) -> None:
    """Write fp32 tensors one at a time, so that only one is in memory, and flush them to the disk.

    Args:
        path: a new file, or one to overwrite.
        shapes: name to shape of every tensor, in the order to write them.
        tensor: called once per name, in that order.
        metadata: the header's free-form text entries.
    Raises:
        OSError: the disk is full or the file cannot be written; a part of it may be left behind.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 8) % 64)  # data begins on a cache line
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            values = tensor(name)
            assert values.dtype == torch.float32 and tuple(values.shape) == shape, name
            file.write(values.contiguous().numpy().data)
        file.flush()
        os.fsync(file.fileno())
