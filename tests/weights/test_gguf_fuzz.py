"""Truncated and mutated GGUF files: a clear error or success, nothing else, little memory."""

from __future__ import annotations

import random
import resource
import struct
import time
from pathlib import Path

import pytest

from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.weights.gguf import read_gguf
from batchwright.weights.gguf_config import config_from_gguf, generation_config_from_gguf
from batchwright.weights.gguf_names import map_names

NUM_MUTATIONS = 3000


def open_like_a_checkpoint(path: Path) -> str:
    """Run everything that reads a header (the torch-free part of opening); "" if it was sound."""
    try:
        file = read_gguf(path)
        config = config_from_gguf(file)
        generation_config_from_gguf(file, config)
        shapes = {name: info.shape for name, info in file.tensors.items()}
        heads = config["num_attention_heads"], config["num_key_value_heads"]
        map_names(path, file.metadata["general.architecture"], shapes, *heads)
    except (ModelFormatError, UnsupportedModelError) as error:
        return str(error)
    return ""


def test_smollm2_truncated_anywhere(smollm2: Path, tmp_path: Path) -> None:
    size = read_gguf(smollm2).data_offset
    with smollm2.open("rb") as file:
        header = bytearray(file.read(size + 4096))
    rng = random.Random(0)
    cuts = {*range(0, 200, 7), *(rng.randrange(size) for _ in range(40)), size - 1, size, size + 99}
    path = tmp_path / "cut.gguf"
    path.write_bytes(header)
    for cut in sorted(cuts, reverse=True):  # cut an existing file: no rewriting
        with path.open("r+b") as file:
            file.truncate(cut)
        with pytest.raises(ModelFormatError):
            read_gguf(path)


def mutate(header: bytes, rng: random.Random) -> bytes:
    """Flip bits, set bytes, or put an interesting integer somewhere."""
    raw = bytearray(header)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        position = rng.randrange(len(raw))
        kind = rng.randrange(4)
        if kind == 0:
            raw[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[position] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            value = rng.choice(
                (0, 1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) + 1, (1 << 64) - 1)
            )
            raw[position : position + 8] = struct.pack("<Q", value)[: len(raw) - position]
        else:
            end = min(len(raw), position + rng.randrange(1, 24))
            del raw[position:end]
            raw[position:position] = rng.randbytes(end - position)
    return bytes(raw)


def test_mutated_headers(tiny_gguf: Path, tmp_path: Path) -> None:
    size = read_gguf(tiny_gguf).data_offset
    content = tiny_gguf.read_bytes()
    assert open_like_a_checkpoint(tiny_gguf) == ""
    rng = random.Random(1)
    path = tmp_path / "mutated.gguf"
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_sound = 0
    slowest_s = 0.0
    for _ in range(NUM_MUTATIONS):
        path.write_bytes(mutate(content[:size], rng) + content[size:])
        start = time.perf_counter()
        message = open_like_a_checkpoint(path)
        slowest_s = max(slowest_s, time.perf_counter() - start)
        num_sound += not message
        assert len(message) < 2000
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert slowest_s < 2
    assert grown_kib < 64 * 1024
    # Some mutations hit a name or a value nobody minds; if all or none did, the test would be void.
    assert 0.02 * NUM_MUTATIONS < num_sound < 0.8 * NUM_MUTATIONS
