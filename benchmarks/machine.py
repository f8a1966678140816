"""What a result must say of where it was measured: memory, machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil


class PeakMemory:
    """Resident memory of this process while the block runs, sampled every 50 ms.

    Attributes:
        before_bytes: at the start of the block.
        peak_bytes: the most that was seen, at least `before_bytes`.
    """

    def __init__(self, interval_s: float = 0.05) -> None:
        self._process = psutil.Process()
        self._interval_s = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before_bytes = self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        self.before_bytes = self.peak_bytes = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sample()
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


def describe_machine() -> dict[str, Any]:
    """Processor, memory, operating system, and thread settings that change timings."""
    return {
        "processor": _processor(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "KMP_", "MKL_", "GOMP_", "NUMBA_", "LD_PRELOAD"))
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def describe_versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of importable packages."""
    versions = {name: import_module(name).__version__ for name in packages}
    return {"python": platform.python_version()} | versions


def describe_commit() -> str:
    """Short commit hash of this checkout, with "+changes" if files differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "-s") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
