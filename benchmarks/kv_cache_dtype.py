"""What attention takes with keys and values in fp32, bf16 and int8.

    python -m benchmarks.kv_cache_dtype [--threads 2] [--repeat 7] [--out JSON]

One layer of SmolLM2's heads (9 of queries, 3 of keys and values, 64 wide) through the CPU backends,
with the rotation and the write of the new token. Decoding: 16 rows of a length each, in memory of
their own; and a chunk of 512 prompt tokens after so many. The formats take turns; medians, and what
they are of fp32's in the same turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchwright.attention.backend import AttentionBatch, GroupBatch
from batchwright.attention.spec import AttentionSpec
from batchwright.exec.build import use_threads
from batchwright.kernels.paged_attention.layout import scales_of
from batchwright.techniques import find
from benchmarks.machine import describe_commit, describe_machine, describe_versions

BACKENDS = {"fp32": "numba", "bf16": "numba_bf16", "int8": "numba_int8"}
NUM_ROWS, BLOCK_SIZE, CHUNK = 16, 32, 512
SPEC = AttentionSpec(layer=0, num_q_heads=9, num_kv_heads=3, head_dim=64, scale=0.125)
LAYERS = 8
"""That take turns, so that keys come from memory as they do in a model."""


class Work:
    """Rows of a length each that compute their last tokens.

    Args:
        num_keys: tokens of each row, the computed ones included.
        num_new: tokens that each computes.
    """

    def __init__(self, num_rows: int, num_keys: int, num_new: int) -> None:
        per_row = -(-num_keys // BLOCK_SIZE)
        table = np.arange(num_rows * per_row, dtype=np.int32).reshape(num_rows, per_row)
        positions = np.tile(np.arange(num_keys - num_new, num_keys, dtype=np.int32), num_rows)
        rows = np.repeat(np.arange(num_rows), num_new)
        slots = table[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        self.num_blocks, self.num_tokens = num_rows * per_row, num_rows * num_new
        self.batch = AttentionBatch(
            slots=np.arange(num_rows, dtype=np.int32),
            cu_seqlens_q=np.arange(num_rows + 1, dtype=np.int32) * num_new,
            positions=positions,
            position_ids=positions,
            groups=(GroupBatch(block_table=table, slot_mapping=slots.astype(np.int32)),),
            block_size=BLOCK_SIZE,
        )
        heads = (SPEC.num_q_heads, SPEC.num_kv_heads, SPEC.num_kv_heads)
        self.qkv = [torch.randn(self.num_tokens, n, SPEC.head_dim) for n in heads]


class Format:
    """A backend with layers of keys and values."""

    def __init__(self, name: str, work: Work) -> None:
        self._backend = find("attention.backends", BACKENDS[name]).Backend()
        self._work = work
        self._layers = [
            self._backend.allocate(SPEC, work.num_blocks, BLOCK_SIZE, torch.float32)
            for _ in range(LAYERS)
        ]
        for layer in self._layers:
            _fill(layer)
        self.seconds()

    def seconds(self) -> float:
        """Of one layer."""
        plan = self._backend.plan(self._work.batch)
        start = time.perf_counter()
        for layer in self._layers:
            self._backend.run(SPEC, 0, *self._work.qkv, layer, plan)
        return (time.perf_counter() - start) / LAYERS


def _fill(layer: Any) -> None:
    """Ordinary numbers everywhere: those too small to be normal would be slow."""
    for kept in (layer.keys, layer.values):
        numbers = np.linspace(-1, 1, kept.shape[3], dtype=np.float32)
        if kept.dtype == np.uint16:
            kept[...] = numbers.view(np.uint32) >> 16
        else:
            kept[...] = numbers if kept.dtype == np.float32 else (127 * numbers).astype(np.int8)
    if layer.keys.dtype == np.int8:
        scales_of(layer.keys)[...] = 1 / 127


def compare(work: Work, repeat: int) -> dict[str, dict[str, float]]:
    """Seconds of each format, and the median of fp32's over its own."""
    formats = {name: Format(name, work) for name in BACKENDS}
    turns = [{name: one.seconds() for name, one in formats.items()} for _ in range(repeat)]
    return {
        name: {
            "us": 1e6 * statistics.median(turn[name] for turn in turns),
            "times_fp32": statistics.median(turn["fp32"] / turn[name] for turn in turns),
        }
        for name in BACKENDS
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    use_threads(options.threads)
    lines: list[dict[str, Any]] = []
    for what, num_rows, num_keys, num_new in (
        *(("decoding", NUM_ROWS, length, 1) for length in (128, 512, 2048, 4096, 8000)),
        ("decoding, one row", 1, 8000, 1),
        ("chunk", 1, CHUNK, CHUNK),
        ("chunk", 1, 4096, CHUNK),
    ):
        found = compare(Work(num_rows, num_keys, num_new), options.repeat)
        lines.append({"what": what, "rows": num_rows, "keys": num_keys, "formats": found})
        print(
            f"{what:18} {num_rows:3} rows {num_keys:5} keys  "
            + "  ".join(
                f"{name} {one['us']:8.0f} us {one['times_fp32']:.2f}x"
                for name, one in found.items()
            ),
            flush=True,
        )
    if options.out:
        result = {
            "benchmark": "benchmarks.kv_cache_dtype",
            "threads": options.threads,
            "repeat": options.repeat,
            "lines": lines,
            "machine": describe_machine(),
            "versions": describe_versions("torch", "numpy", "numba"),
            "commit": describe_commit(),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
