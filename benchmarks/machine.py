"""What a result must say of where it was measured: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil


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
