"""Raw operations. Each folder holds a readable `naive` twin beside the fast one.

The OpenMP threading layer is chosen here, in code: a parallel call costs 22 us with it and 190 us
with Numba's default `workqueue` (2 cores, measured), which is a large part of a decode step.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba
from numba.core import event

from batchwright.user_cache import user_cache_directory

numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]


_num_threads = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def set_num_threads(num_threads: int) -> None:
    """Threads of all Numba kernels, at most those Numba started with (the cores it may use)."""
    global _num_threads
    _num_threads = min(num_threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(_num_threads)


def get_num_threads() -> int:
    """Threads of all kernels. Numba's own function of this name takes 9 us, this one 0.05."""
    return _num_threads


def compile_seconds() -> float:
    """Seconds this process has spent compiling kernels; kernels found in the cache take none."""
    return float(_compiling.duration) if _compiling.done else 0.0


_compiling = event.TimingListener()
event.register("numba:compile", _compiling)


def _use_cache_of_these_sources() -> None:
    """Cache compiled kernels by the content of all of them.

    Numba compares only the file a kernel stands in, so after a change of a function that a kernel
    calls from another file it would run the old machine code.
    """
    directory = user_cache_directory("kernels")
    if numba.config.CACHE_DIR or directory is None:  # type: ignore[attr-defined]
        return  # the user's own NUMBA_CACHE_DIR, or nowhere to go but beside the sources
    folder = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    numba.config.CACHE_DIR = str(directory / digest.hexdigest()[:16])  # type: ignore[attr-defined]


_use_cache_of_these_sources()
