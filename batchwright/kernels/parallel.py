"""Parallel loops over tasks, compiled apart from the work that a task does.

Numba compiles the body of a `prange` loop, and all it calls, about four times. Here the loop knows
its body only as a function pointer: the sampling kernel compiles in half the time, and each call
costs a few microseconds of dispatch more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cfunc, njit, prange, types


def compile_task(function: Callable[..., None], *arg_types: Any) -> Any:
    """`function(task, num_tasks, *args)` as a pointer to machine code, compiled now or loaded.

    Arguments must later have exactly `arg_types`. The function must not raise.
    """
    signature = types.void(types.int64, types.int64, *arg_types)
    return cfunc(signature, cache=True, error_model="numpy")(function)


@njit(parallel=True, cache=True, error_model="numpy")
def run_tasks(task, num_tasks, *args):  # type: ignore[no-untyped-def]
    """Call task(i, num_tasks, *args) for i in [0, num_tasks), in parallel."""
    for i in prange(num_tasks):
        task(np.int64(i), np.int64(num_tasks), *args)


def read_only(array: Any) -> Any:
    """A read-only view: kernels that only read take this type, whatever the caller has."""
    view = array.view()
    view.flags.writeable = False
    return view


def own(array: Any, dtype: Any) -> Any:
    """The array as C-contiguous and writable with this dtype, copied only if it is not."""
    return np.require(array, dtype, ["C", "W"])
