"""How long loading a model's weights will take, from their files' size and a short read."""

from __future__ import annotations

import time
from pathlib import Path

from batchwright.weights.checkpoint import Checkpoint

SAMPLE_BYTES = 32 * 2**20

CHECK_S = 2.0
"""Making the first step, and all that does not depend on the model's size."""

PACKED_BYTES_PER_S = 300e6
"""Of a file, laid out anew for our products."""


def load_s(checkpoint: Checkpoint) -> float:
    """Seconds from an opened model to its first step, kernels being compiled already."""
    path = checkpoint.path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    num_bytes = sum(file.stat().st_size for file in files)
    return CHECK_S + num_bytes / _read_rate(files[0]) + num_bytes / PACKED_BYTES_PER_S


def _read_rate(file: Path) -> float:
    """Bytes/s of reading from the middle of a file, from the disk or the system's memory."""
    with open(file, "rb", buffering=0) as raw:
        raw.seek(max(0, file.stat().st_size // 2 - SAMPLE_BYTES))
        start_s = time.perf_counter()
        num_bytes = len(raw.read(SAMPLE_BYTES))
        return max(num_bytes, 1) / max(time.perf_counter() - start_s, 1e-9)
