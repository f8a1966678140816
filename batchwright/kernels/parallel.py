"""Parallel loops over tasks, compiled apart from the work that a task does.

Numba compiles the body of a `prange` loop, and all it calls, about five times. Here the loop knows
its body only as an address of machine code, and the body its arguments as an address in memory: a
kernel compiles in a fraction of the time, calls cost nothing more, and a call can be kept, to be
made again together with others (`program.py`). (Passing Numba's own function objects costs 8 us for
each call of the loop.)
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from batchwright.kernels import get_num_threads

_I64 = ir.IntType(64)

# Machine code finds only functions that it is told of.
_YIELD = "sched_yield"
llvm.add_symbol(_YIELD, ctypes.cast(getattr(ctypes.CDLL(None), _YIELD), ctypes.c_void_p).value)


class Task(NamedTuple):
    """Machine code of a kernel's body: task(i, num_tasks, address of arguments)."""

    code: Any  # valid as long as it lives
    address: int
    kernel: str  # the folder's name


class Recorder(Protocol):
    """Who is told of every call of `run_tasks`, and of the memory between them."""

    def add(self, task: Task, num_tasks: int, args: tuple[Any, ...]) -> None:
        """A call that has been made."""
        ...

    def note(self, array: Any, *, is_counter: bool = False) -> None:
        """An array that only kernels write and read, or that has to be zero when a call begins."""
        ...


class _Recording(threading.local):
    """A thread's recorder: other threads' calls are not for its program."""

    recorder: Recorder | None = None


_recording = _Recording()


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Tell a recorder, which must be the thread's only one, of all calls made inside."""
    assert _recording.recorder is None
    _recording.recorder = recorder
    try:
        yield
    finally:
        _recording.recorder = None


def compile_task(function: Callable[[int, int, int], None]) -> Task:
    """`function(i, num_tasks, at)`, compiled now or loaded.

    `at` is for an `argument_reader`. The function must not raise.
    """
    # Starts Numba's threads, which a parallel loop that is loaded within other code does not do.
    numba.get_num_threads()
    code = cfunc(types.void(types.int64, types.int64, types.int64), cache=True,
                 error_model="numpy")(function)  # fmt: skip
    return Task(code, code.address, function.__module__.split(".")[-2])


def run_tasks(task: Task, num_tasks: int, *args: Any) -> None:
    """Call task(i, num_tasks, at) for i in [0, num_tasks), in parallel.

    Args:
        args: must have exactly the types of the reader that the task uses.
    """
    _run_tasks(task.address, num_tasks, *args)
    if _recording.recorder is not None:
        _recording.recorder.add(task, num_tasks, args)


def threads_for(work: int, work_per_thread: int) -> int:
    """Threads for one call: a second one if there is more work than waking it takes.

    In a recorded call nobody has to be woken, and a 16th of the work is enough.
    """
    if _recording.recorder is not None:
        work_per_thread = work_per_thread // 16 + 1
    return min(get_num_threads(), work // max(work_per_thread, 1) + 1)


def scratch(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array for what a call writes and only it and later calls read."""
    array = np.empty(shape, dtype)
    if _recording.recorder is not None:
        _recording.recorder.note(array)
    return array


def zero_counters(count: int) -> Any:
    """[count] int64, zeros whenever the call that they are for begins."""
    counters = np.zeros(count, np.int64)
    if _recording.recorder is not None:
        _recording.recorder.note(counters, is_counter=True)
    return counters


@njit(cache=True)
def _run_tasks(address, num_tasks, *args):  # type: ignore[no-untyped-def]
    _call_tasks(address, num_tasks, _arguments_on_stack(args))


@njit(parallel=True, cache=True, error_model="numpy")
def _call_tasks(address, num_tasks, at):  # type: ignore[no-untyped-def]
    """With one task nothing is parallel and no thread is woken."""
    if num_tasks == 1:
        call(address, np.int64(0), np.int64(1), at)
    else:
        for i in prange(num_tasks):
            call(address, np.int64(i), np.int64(num_tasks), at)


def argument_reader(*arg_types: Any) -> Any:
    """A function for njit code, of an address: the arguments, of these types, that lie there."""
    tuple_type = types.Tuple(arg_types)

    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer_type = context.get_value_type(tuple_type).as_pointer()
            value = builder.load(builder.inttoptr(args[0], pointer_type))
            value.align = 8
            return value

        return tuple_type(types.int64), codegen

    return read


@njit(cache=True)
def store_arguments(address, room, *args):  # type: ignore[no-untyped-def]
    """Put arguments at an address, for a reader; they must outlive what is there.

    Returns the bytes that they take; if these are more than `room` nothing is written.
    """
    return _store_arguments(address, room, args)


@intrinsic
def _store_arguments(typingctx: Any, address: Any, room: Any, args: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        borrowed = _borrowed(context, builder, signature.args[2], values[2])
        size = _I64(context.get_abi_sizeof(borrowed.type))
        with builder.if_then(builder.icmp_signed("<=", size, values[1])):
            pointer = builder.inttoptr(values[0], borrowed.type.as_pointer())
            builder.store(borrowed, pointer).align = 8
        return size

    return types.int64(types.int64, types.int64, args), codegen


@intrinsic
def _arguments_on_stack(typingctx: Any, args: Any) -> Any:
    """Address of a copy that lives as long as the calling function runs."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        borrowed = _borrowed(context, builder, signature.args[0], values[0])
        pointer = cgutils.alloca_once(builder, borrowed.type)
        builder.store(borrowed, pointer).align = 8
        return builder.ptrtoint(pointer, _I64)

    return types.int64(args), codegen


def _borrowed(context: Any, builder: Any, tuple_type: Any, value: Any) -> Any:
    """The tuple, with arrays that nobody counts references of: a reader gives none back."""
    for i, element_type in enumerate(tuple_type.types):
        if isinstance(element_type, types.Array):
            element = builder.extract_value(value, i)
            array = context.make_array(element_type)(context, builder, element)
            array.meminfo = cgutils.get_null_value(array.meminfo.type)
            array.parent = cgutils.get_null_value(array.parent.type)
            value = builder.insert_value(value, array._getvalue(), i)
    return value


@intrinsic
def call(typingctx: Any, address: Any, task: Any, num_tasks: Any, at: Any) -> Any:
    """Call a task by its address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        function = builder.inttoptr(values[0], function_type.as_pointer())
        builder.call(function, values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


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


SPINS = 1000


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


def _call_llvm(builder: Any, result: Any, name: str, *args: Any) -> Any:
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, args)


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


@intrinsic
def read_ticks(typingctx: Any) -> Any:
    """int64: the processor's clock, of constant rate; 0 where there is none that may be read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() != "x86_64":  # ARM's may not be read, or LLVM does not know it
            return _I64(0)
        return _call_llvm(builder, _I64, "llvm.readcyclecounter")

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


def read_only(array: Any) -> Any:
    """A read-only view: kernels that only read take this type, whatever the caller has."""
    view = array.view()
    view.flags.writeable = False
    return view


def own(array: Any, dtype: Any) -> Any:
    """The array as C-contiguous and writable with this dtype, copied only if it is not."""
    return np.require(array, dtype, ["C", "W"])
