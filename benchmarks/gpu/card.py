"""The card a result was measured on, and how calls are timed on it."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

Call = Callable[[], object]


class Budget:
    """A number of seconds, counted from when it is made."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds left; negative when it is spent."""
        return self._end - time.monotonic()

    def is_spent(self) -> bool:
        return self.left_s() <= 0


class Timer:
    """Seconds per call: replays of a CUDA graph between events, or a clock on a CPU (dry run)."""

    def __init__(self, device: str, *, batch_s: float = 0.004, num_batches: int = 5) -> None:
        self.device = device
        self._batch_s = batch_s
        self._num_batches = num_batches

    def seconds(self, calls: Sequence[Call]) -> tuple[float, float]:
        """(median, spread) of the seconds of one of `calls`, which take turns.

        Give calls that use different memory, more than the card's cache together, to measure
        what comes from its memory. The spread is (largest - smallest) / median over batches.
        """
        if self.device == "cpu":
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls), 0.0
        graph = _capture(calls)
        once = _replay_seconds(graph, 1)  # warm
        replays = max(1, min(1000, round(self._batch_s / once)))
        times = [_replay_seconds(graph, replays) / replays for _ in range(self._num_batches)]
        median = statistics.median(times)
        return median / len(calls), (max(times) - min(times)) / median


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and makes handles, outside of the graph
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def ceilings(timer: Timer) -> dict[str, float]:
    """What the card at hand can do: bytes and FLOPs a second, measured.

    copy_bytes_per_s: a kernel that copies 2 GiB, bytes read plus bytes written (copy_ is a memcpy,
    which reached 2.7 TB/s on an H200, where kernels read at 4.5). matrix_flops_per_s: bf16
    product of [8192, 8192] with random numbers, after half a second of such products, so that the
    clock is the one that lasts.
    """
    if timer.device == "cpu":
        source, factor = torch.randn(1 << 20), torch.randn(256, 256)
    else:
        source = torch.randn(1 << 29, device=timer.device)
        factor = torch.randn(8192, 8192, device=timer.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_s, _ = timer.seconds([lambda: torch.mul(source, 1.0, out=target)])
    if timer.device != "cpu":
        start = time.monotonic()
        while time.monotonic() - start < 0.5:
            for _ in range(20):
                factor @ factor
            torch.cuda.synchronize()
    product_s, _ = timer.seconds([lambda: factor @ factor])
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copy_s,
        "matrix_flops_per_s": 2 * len(factor) ** 3 / product_s,
    }


def architecture(device: str) -> int:
    """Ten times the compute capability; of an H100 where there is no card."""
    if device == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def describe(device: str) -> dict[str, Any]:
    """Card, driver, versions, commit and date."""
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "numpy": np.__version__,
        },
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        "num_cpus": len(os.sched_getaffinity(0)),
    }
    if device == "cpu":
        return about | {"card": "none: a dry run in Triton's interpreter, no measurement"}
    properties = torch.cuda.get_device_properties(device)
    return about | {
        "card": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "num_multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks_mhz_sm_memory": _output(
            "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"
        ),
        "power_limit_w": _output(
            "nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"
        ),
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
