"""Parallel loops over tasks, compiled apart from the work that a task does.

Numba compiles the body of a `prange` loop, and all it calls, about five times. Here the loop knows
its body only as an address of machine code, and the body its arguments as an address in memory: a
kernel compiles in a fraction of the time, calls cost nothing more, and a call can be kept, to be
made again together with others (`program.py`). (Passing Numba's own function objects costs 8 us for
each call of the loop.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numba
import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.extending import intrinsic

from batchwright.kernels import get_num_threads
from batchwright.kernels.arguments import arguments_on_stack

_I64 = ir.IntType(64)


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
    _call_tasks(address, num_tasks, arguments_on_stack(args))


@njit(parallel=True, cache=True, error_model="numpy")
def _call_tasks(address, num_tasks, at):  # type: ignore[no-untyped-def]
    """With one task nothing is parallel and no thread is woken."""
    if num_tasks == 1:
        call(address, np.int64(0), np.int64(1), at)
    else:
        for i in prange(num_tasks):
            call(address, np.int64(i), np.int64(num_tasks), at)


@intrinsic
def call(typingctx: Any, address: Any, task: Any, num_tasks: Any, at: Any) -> Any:
    """Call a task by its address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        function = builder.inttoptr(values[0], function_type.as_pointer())
        builder.call(function, values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


def read_only(array: Any) -> Any:
    """A read-only view: kernels that only read take this type, whatever the caller has."""
    view = array.view()
    view.flags.writeable = False
    return view


def own(array: Any, dtype: Any) -> Any:
    """The array as C-contiguous and writable with this dtype, copied only if it is not."""
    return np.require(array, dtype, ["C", "W"])
