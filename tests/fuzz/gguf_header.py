"""Headers of GGUF files: keys, tensor table, and the model's settings made of them."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.weights.gguf import read_gguf
from batchwright.weights.gguf_config import config_from_gguf, generation_config_from_gguf
from batchwright.weights.gguf_names import map_names
from tests.fuzz.allocation import allocates_in_proportion, file_of
from tests.weights.tiny_gguf import write_tiny_gguf


def run(data: bytes) -> None:
    """The bytes are the file."""
    path = file_of(data, "fuzz.gguf")
    with allocates_in_proportion(len(data)):
        try:
            file = read_gguf(path)
            assert sum(info.nbytes for info in file.tensors.values()) <= len(data)
            for name in file.tensors:
                assert len(file.raw(name)) == file.tensors[name].nbytes
            config = config_from_gguf(file)
            generation_config_from_gguf(file, config)
            shapes = {name: info.shape for name, info in file.tensors.items()}
            heads = config["num_attention_heads"], config["num_key_value_heads"]
            map_names(path, file.metadata["general.architecture"], shapes, *heads)
        except (ModelFormatError, UnsupportedModelError):
            pass


def seeds() -> list[bytes]:
    """A whole small model, its header alone, and headers that claim far more than they hold."""
    with tempfile.TemporaryDirectory() as folder:
        whole = write_tiny_gguf(Path(folder) / "tiny.gguf").read_bytes()
    start, huge = b"GGUF" + struct.pack("<I", 3), 1 << 60
    key = struct.pack("<Q", 1) + b"k"
    return [
        whole,
        whole[:2048],
        start + struct.pack("<QQ", huge, 1) + bytes(64),
        start + struct.pack("<QQ", 0, huge) + bytes(64),
        *(
            start + struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, kind, huge) + bytes(64)
            for kind in range(13)
        ),
        start + struct.pack("<QQ", 0, 1) + key + struct.pack("<IQ", 8, huge) + bytes(64),
        start + struct.pack("<QQ", 1, 0) + key + struct.pack("<IQIQ", 1, huge, 0, 0) + bytes(64),
    ]


WORDS = ("GGUF", "general.alignment", "general.architecture", "llama", "split.count")
