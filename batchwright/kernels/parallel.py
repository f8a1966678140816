"""Parallel loops over tasks, compiled apart from the work that a task does.

Numba compiles the body of a `prange` loop, and all it calls, about five times. Here the loop knows
its body only as an address of machine code: a kernel compiles in a fraction of the time, and calls
cost nothing more. (Passing Numba's own function objects costs 8 us for each call of the loop.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.extending import intrinsic


def compile_task(function: Callable[..., None], *arg_types: Any) -> Any:
    """`function(task, num_tasks, *args)` as machine code, compiled now or loaded.

    Its `address` is for `run_tasks`; it is valid as long as the returned object lives. Arguments
    must later have exactly `arg_types`. The function must not raise.
    """
    signature = types.void(types.int64, types.int64, *arg_types)
    return cfunc(signature, cache=True, error_model="numpy")(function)


@njit(parallel=True, cache=True, error_model="numpy")
def run_tasks(address, num_tasks, *args):  # type: ignore[no-untyped-def]
    """Call the task at `address` as task(i, num_tasks, *args) for i in [0, num_tasks), in parallel.

    With one task nothing is parallel and no thread is woken.
    """
    if num_tasks == 1:
        _call(address, np.int64(0), np.int64(1), args)
    else:
        for i in prange(num_tasks):
            _call(address, np.int64(i), np.int64(num_tasks), args)


@intrinsic
def _call(typingctx: Any, address: Any, task: Any, num_tasks: Any, args: Any) -> Any:
    """Call compiled code with two integers and the elements of a tuple."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        arg_types = (types.int64, types.int64, *signature.args[3])
        function_type = ir.FunctionType(
            ir.VoidType(), [context.get_value_type(arg) for arg in arg_types]
        )
        function = builder.inttoptr(values[0], function_type.as_pointer())
        elements = [builder.extract_value(values[3], i) for i in range(len(signature.args[3]))]
        builder.call(function, [values[1], values[2], *elements])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, args), codegen


@intrinsic
def next_task(typingctx: Any, counter: Any) -> Any:
    """counter[0]++ (atomic), returning the old value: int64, for threads that share out tasks."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


@intrinsic
def add_done(typingctx: Any, counters: Any) -> Any:
    """counters[1]++ (atomic); what this thread wrote before is seen by who waits for the count."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        done = builder.gep(data, [ir.Constant(ir.IntType(64), 1)])
        builder.atomic_rmw("add", done, ir.Constant(ir.IntType(64), 1), "release")
        return context.get_dummy_value()

    return types.void(counters), codegen


@intrinsic
def wait_for(typingctx: Any, counters: Any, count: Any) -> Any:
    """Spin until counters[1] is at least `count`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        done = builder.gep(data, [ir.Constant(ir.IntType(64), 1)])
        spin = builder.append_basic_block("spin")
        go_on = builder.append_basic_block("go_on")
        builder.branch(spin)
        builder.position_at_end(spin)
        enough = builder.icmp_signed(">=", builder.load_atomic(done, "acquire", 8), args[1])
        builder.cbranch(enough, go_on, spin)
        builder.position_at_end(go_on)
        return context.get_dummy_value()

    return types.void(counters, types.int64), codegen


def read_only(array: Any) -> Any:
    """A read-only view: kernels that only read take this type, whatever the caller has."""
    view = array.view()
    view.flags.writeable = False
    return view


def own(array: Any, dtype: Any) -> Any:
    """The array as C-contiguous and writable with this dtype, copied only if it is not."""
    return np.require(array, dtype, ["C", "W"])
