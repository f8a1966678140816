"""One safetensors file, opened with clear errors.

The `safetensors` library bounds the header and checks that the tensors tile the file exactly;
tensors it returns are private copy-on-write views of the mapped file, so nothing is read before it
is used.
"""

from __future__ import annotations

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
