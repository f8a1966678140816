"""Raw operations. Each folder holds a readable `naive` twin beside the fast one.

The OpenMP threading layer is chosen here, in code: a parallel call costs 22 us with it and 190 us
with Numba's default `workqueue` (2 cores, measured), which is a large part of a decode step.
"""

import numba

numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]


def set_num_threads(num_threads: int) -> None:
    """Threads of all Numba kernels, at most those Numba started with (the cores it may use)."""
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
