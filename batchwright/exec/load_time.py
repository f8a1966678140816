"""How long loading a model's weights will take, from their files' size and a short read."""

from __future__ import annotations

import time
from pathlib import Path

from batchwright.weights.cache import CachedCheckpoint
from batchwright.weights.checkpoint import Checkpoint

SAMPLE_BYTES = 32 * 2**20
UNPACKED_BYTES_PER_S = 150e6
"""Dequantising a GGUF file and writing the result, once (540 MB took 3 to 4 s on 2 cores)."""

CHECK_S = 2.0
"""Trying the BLAS and making the first step; does not depend on the model's size."""


def load_s(checkpoint: Checkpoint, weight_bytes: int) -> float:
    """Seconds from an opened model to its first step, kernels being compiled already.

    Args:
        weight_bytes: what the weights take in memory.
    """
    if isinstance(checkpoint, CachedCheckpoint):
        if not checkpoint.file.is_file():
            return CHECK_S + weight_bytes / UNPACKED_BYTES_PER_S
        files = [checkpoint.file]
    elif checkpoint.path.is_dir():
        files = sorted(checkpoint.path.glob("*.safetensors"))
    else:
        return CHECK_S + weight_bytes / UNPACKED_BYTES_PER_S
    num_bytes = sum(file.stat().st_size for file in files)
    return CHECK_S + num_bytes / _read_rate(files[0])


def _read_rate(file: Path) -> float:
    """Bytes/s of reading from the middle of a file, from the disk or the system's memory."""
    with open(file, "rb", buffering=0) as raw:
        raw.seek(max(0, file.stat().st_size // 2 - SAMPLE_BYTES))
        start_s = time.perf_counter()
        num_bytes = len(raw.read(SAMPLE_BYTES))
        return max(num_bytes, 1) / max(time.perf_counter() - start_s, 1e-9)
