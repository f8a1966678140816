"""The processor's clock, for njit code."""

from __future__ import annotations

import functools
import platform
import time
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_I64 = ir.IntType(64)


@intrinsic
def read_ticks(typingctx: Any) -> Any:
    """int64: the processor's clock, of constant rate; 0 where there is none that may be read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() != "x86_64":  # ARM's may not be read, or LLVM does not know it
            return _I64(0)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_I64, []), "llvm.readcyclecounter"
        )
        return builder.call(function, [])

    return types.int64(), codegen


@njit(cache=True)
def _ticks():  # type: ignore[no-untyped-def]
    return read_ticks()


@functools.cache
def ticks_per_second() -> float:
    """Of `read_ticks`, measured for 20 ms; 0 where there is no such clock."""
    _ticks()  # compiled or loaded
    start, ticks = time.perf_counter(), _ticks()
    time.sleep(0.02)
    return float(_ticks() - ticks) / (time.perf_counter() - start)
