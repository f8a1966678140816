"""Counters that threads share, and how they wait for each other."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_I64 = ir.IntType(64)

SPINS = 1000
"""Looks at a counter before others are let run: with x86's pause some 30 us."""

# Machine code finds only functions that it is told of.
_YIELD = "sched_yield"
llvm.add_symbol(_YIELD, ctypes.cast(getattr(ctypes.CDLL(None), _YIELD), ctypes.c_void_p).value)


@intrinsic
def next_task(typingctx: Any, counter: Any) -> Any:
    """counter[0]++ (atomic), returning the old value: int64, for threads that share out tasks."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, _I64(1), "monotonic")

    return types.int64(counter), codegen


@intrinsic
def add_done(typingctx: Any, counters: Any, index: Any) -> Any:
    """counters[index]++ (atomic), returning the old value.

    What this thread wrote before is seen by who waits for the count.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), _I64(1), "release")

    return types.int64(counters, types.int64), codegen


@njit(error_model="numpy")
def wait_for(counters, index, count):  # type: ignore[no-untyped-def]
    """Return when counters[index] is at least `count`.

    Threads that are on no core could not go on while this one spins: after some 30 us it lets
    others run, time and again.
    """
    spins = 0
    while load_acquire(counters, index) < count:
        spins += 1
        pause()
        if spins % SPINS == 0:
            let_others_run()


@intrinsic
def load_acquire(typingctx: Any, counters: Any, index: Any) -> Any:
    """counters[index], and all that was written before it was counted up to that."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "acquire", 8)

    return types.int64(counters, types.int64), codegen


@intrinsic
def exchange_if_zero(typingctx: Any, counters: Any, index: Any, value: Any) -> Any:
    """counters[index] = value if it is 0 (atomic), returning the old value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        at = builder.gep(data, [args[1]])
        result = builder.cmpxchg(at, _I64(0), args[2], "acq_rel", "acquire")
        return builder.extract_value(result, 0)

    return types.int64(counters, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the processor that this is a waiting loop, where it has an instruction for that."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        machine = platform.machine()
        if machine == "x86_64":
            _call_llvm(builder, ir.VoidType(), "llvm.x86.sse2.pause")
        elif machine in ("aarch64", "arm64"):
            _call_llvm(builder, ir.VoidType(), "llvm.aarch64.hint", ir.IntType(32)(1))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def let_others_run(typingctx: Any) -> Any:
    """sched_yield."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call_llvm(builder, ir.IntType(32), _YIELD)
        return context.get_dummy_value()

    return types.void(), codegen


def _call_llvm(builder: Any, result: Any, name: str, *args: Any) -> Any:
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, args)
