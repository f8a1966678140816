"""Headers of safetensors files: names, dtypes, shapes, and where the data lies."""

from __future__ import annotations

import json
import struct
from typing import Any

from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.weights.safetensors_file import open_safetensors, read_tensor
from tests.fuzz.allocation import allocates_in_proportion, file_of


def run(data: bytes) -> None:
    """The bytes are the file."""
    path = file_of(data, "fuzz.safetensors")
    with allocates_in_proportion(len(data)):
        try:
            handle = open_safetensors(path)
            for name in list(handle.keys()):
                tensor = read_tensor(handle, path, name)
                assert tensor.nbytes <= len(data)
        except (ModelFormatError, UnsupportedModelError):
            pass


def file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, which may claim another length."""
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def seeds() -> list[bytes]:
    """A sound file, and some that claim far more than they hold."""
    a, b = entry("F32", [2, 2], 0, 16), entry("BF16", [3], 16, 22)
    return [
        file({"__metadata__": {"format": "pt"}, "a": a, "b": b}, bytes(22)),
        file({"a": entry("F16", [], 0, 2)}, bytes(2)),
        file({"a": entry("F32", [0, 1 << 62], 0, 0)}),
        file({"a": entry("F32", [1 << 40, 1 << 40], 0, 1 << 60)}, bytes(16)),
        file({"a": entry("U8", [4], 0, 4)}, bytes(4)),
        file({}, bytes(16), length=1 << 60),
        file({}),
    ]


WORDS = ("__metadata__", "dtype", "shape", "data_offsets", "F32", "F64", "F8_E4M3", "I64", "BOOL")
