"""Programs: the kernel calls of a computation, recorded once and run again as one parallel loop.

A step of a small model makes some 270 calls. One by one each costs what Python needs for it and
what it takes to wake threads, 20 to 50 us here, which with few rows is as long as the kernels run.
A program is a list of addresses: its threads go through it together and wait for each other, by
spinning, after every call. On a GPU the same is done by CUDA graphs (`exec/device/graphs.py`).

What may be recorded is a computation of nothing but our kernels: between them torch may only take
views. `check` sees every operation of torch, and refuses if there is another. Results have the bits
of the calls one by one: they are the same calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange
from torch.utils._python_dispatch import TorchDispatchMode

from batchwright.kernels import get_num_threads
from batchwright.kernels.aligned import CACHE_LINE_BYTES, aligned_zeros
from batchwright.kernels.arguments import store_arguments
from batchwright.kernels.atomics import (
    add_done,
    exchange_if_zero,
    load_acquire,
    pause,
    wait_for,
)
from batchwright.kernels.parallel import Task, call, recorded
from batchwright.kernels.ticks import read_ticks, ticks_per_second

ADDRESS, NUM_TASKS, ARGUMENTS = range(3)
"""Columns of a program's list of calls."""


class CannotRecord(Exception):
    """The computation does something that a program could not do again."""


class SharedMemory:
    """What programs have between their calls; one for many, since one runs at a time."""

    def __init__(self) -> None:
        self._memory = aligned_zeros((0,), np.uint8)

    def of(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """At least so many bytes. What was given out before stays what it is."""
        if self._memory.nbytes < num_bytes:
            self._memory = aligned_zeros((max(num_bytes, 2 * self._memory.nbytes),), np.uint8)
        return self._memory


class Program:
    """Calls that are run again, on the same memory.

    Attributes:
        result: what the recorded function returned; overwritten by every run.
        kernels: names of the calls' kernels.
        threads_come: False once a run has waited for threads that there are not.
    """

    threads_come = True

    def __init__(self, calls: list[_Call], counters: Any, result: torch.Tensor) -> None:
        self.result = result
        self.kernels = [one.task.kernel for one in calls]
        self._held = calls  # their arrays
        self._counters = counters
        self._state = np.zeros((3, CACHE_LINE_BYTES // 8), np.int64)
        sizes = [store_arguments(0, 0, *one.args) for one in calls]
        self._arguments = aligned_zeros((sum(_up(size) for size in sizes),), np.uint8)
        self._calls = np.zeros((len(calls), 3), np.int64)
        self._ticks = np.zeros(len(calls), np.int64)  # of the processor's clock, of all runs
        at = self._arguments.ctypes.data
        for line, size, one in zip(self._calls, sizes, calls, strict=True):
            store_arguments(at, size, *one.args)
            line[:] = one.task.address, one.num_tasks, at
            at += _up(size)

    def run(self) -> torch.Tensor:
        """Make all calls, one after the other."""
        self._counters[:] = 0
        self._state[:] = 0
        _run(
            self._calls,
            get_num_threads() if Program.threads_come else 1,
            self._state,
            self._ticks,
        )
        if self._state.flat[_TEAM] == _ALONE:
            Program.threads_come = False
        return self.result

    def seconds_by_kernel(self) -> dict[str, float]:
        """What its runs took so far; waiting for threads counts as the call that is waited for."""
        seconds = dict.fromkeys(self.kernels, 0.0)
        for kernel, ticks in zip(self.kernels, self._ticks.tolist(), strict=True):
            seconds[kernel] += ticks / ticks_per_second()
        return seconds


def check(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of a computation that can be recorded. It takes some time more than without.

    Raises:
        CannotRecord: torch computes a part of it.
    """
    with _OnlyViews():
        return compute()


def record(
    compute: Callable[[], torch.Tensor], memory: SharedMemory
) -> tuple[torch.Tensor, Program]:
    """The result of a computation, and a program that makes its calls again.

    Whatever the calls read or write that is not taken by the computation itself must stay where it
    is.

    The computation must be one that `check` lets pass.

    Raises:
        CannotRecord: it is not.
    """
    recorder = _Recorder()
    with recorded(recorder):
        result = compute()
    return result, recorder.program(result, memory)


class _Piece:
    """Memory that is taken while recording."""

    def __init__(self, address: int, num_bytes: int, *, is_counter: bool) -> None:
        self.address, self.num_bytes = address, num_bytes
        self.is_counter = is_counter
        self.first_use = self.last_use = -1
        self.offset = 0


class _View(NamedTuple):
    """An array in a piece."""

    piece: _Piece
    offset: int
    like: tuple[Any, ...]  # shape, dtype, strides

    def within(self, memory: Any) -> np.ndarray:
        shape, dtype, strides = self.like
        offset = self.piece.offset + self.offset
        return np.ndarray(shape, dtype, memory, offset, strides)


class _Call(NamedTuple):
    task: Task
    num_tasks: int
    args: tuple[Any, ...]


class _OnlyViews(TorchDispatchMode):
    """Refuses whatever torch computes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: True, torch's default, imports its compiler, which takes more than a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # In inference mode there are operations here that may be views, such as reshape.
        shared = {arg.untyped_storage().data_ptr() for arg in args if torch.is_tensor(arg)}
        results = result if isinstance(result, list | tuple) else [result]
        if not func.is_view or any(
            part.untyped_storage().data_ptr() not in shared for part in results
        ):
            raise CannotRecord(f"torch computes {func}")
        return result


class _Recorder:
    """Notes calls of kernels, and memory that is taken between them and given back."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._pieces: dict[int, _Piece] = {}  # those not given back, by address
        self._used: list[_Piece] = []

    def note(self, array: Any, *, is_counter: bool = False) -> None:
        """See `parallel.Recorder`."""
        address = array.ctypes.data
        if array.nbytes:
            self._pieces[address] = _Piece(address, array.nbytes, is_counter=is_counter)
            weakref.finalize(array, self._pieces.pop, address)

    def add(self, task: Task, num_tasks: int, args: tuple[Any, ...]) -> None:
        """See `parallel.Recorder`."""
        seen = tuple(self._view(arg) if isinstance(arg, np.ndarray) else arg for arg in args)
        self._calls.append(_Call(task, num_tasks, seen))

    def _view(self, array: np.ndarray) -> _View | np.ndarray:
        """Where in a piece an array lies; arrays that lie elsewhere stay where they are."""
        address = array.ctypes.data
        for piece in self._pieces.values():
            if piece.address <= address < piece.address + piece.num_bytes and array.size:
                if piece.first_use < 0:
                    piece.first_use = len(self._calls)
                    self._used.append(piece)
                piece.last_use = len(self._calls)
                return _View(piece, address - piece.address, _like(array))
        return array

    def program(self, result: torch.Tensor, memory: SharedMemory) -> Program:
        """The calls so far, with memory between them as small as can be."""
        view = self._view(result.numpy())
        if not isinstance(view, _View):
            raise CannotRecord("the result lies in memory that was there before")
        between = memory.of(_place([piece for piece in self._used if not piece.is_counter]))
        counters = aligned_zeros(
            (_place_apart([piece for piece in self._used if piece.is_counter]),), np.uint8
        )

        def moved(arg: Any) -> Any:
            if not isinstance(arg, _View):
                return arg
            return arg.within(counters if arg.piece.is_counter else between)

        calls = [_Call(*one[:2], tuple(moved(arg) for arg in one.args)) for one in self._calls]
        return Program(calls, counters, torch.from_numpy(moved(view)))


def _like(array: np.ndarray) -> tuple[Any, ...]:
    return array.shape, array.dtype, array.strides


def _place(pieces: list[_Piece]) -> int:
    """Give each piece the lowest place that is free as long as it is used; bytes for all.

    Args:
        pieces: in the order of their first use.
    """
    total = 0
    placed: list[_Piece] = []
    for piece in pieces:
        placed = [other for other in placed if other.last_use >= piece.first_use]
        piece.offset = 0
        for other in sorted(placed, key=lambda other: other.offset):
            if other.offset - piece.offset >= piece.num_bytes:
                break
            piece.offset = max(piece.offset, _up(other.offset + other.num_bytes))
        placed.append(piece)
        total = max(total, piece.offset + piece.num_bytes)
    return total


def _place_apart(pieces: list[_Piece]) -> int:
    """Give each piece a cache line of its own; bytes for all."""
    total = 0
    for piece in pieces:
        piece.offset = total
        total += _up(piece.num_bytes)
    return total


def _up(num_bytes: int) -> int:
    return -(-num_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES


# --- running --------------------------------------------------------------------------------------

_PRESENT, _TEAM, _DONE = (line * CACHE_LINE_BYTES // 8 for line in range(3))
_TOGETHER, _ALONE = 1, 2
_PATIENCE = 50_000_000
"""Pauses, about a second on x86, after which a thread that is still alone does everything."""


@njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def _run(calls: Any, num_threads: int, state: Any, ticks: Any) -> None:
    flat = state.reshape(-1)
    if num_threads == 1:
        _go_through(calls, 0, 1, flat, ticks)
    else:
        for thread in prange(num_threads):
            _join(calls, thread, num_threads, flat, ticks)


@njit(error_model="numpy")
def _join(calls: Any, thread: int, num_threads: int, state: Any, ticks: Any) -> None:
    """Go through the calls when all threads are there.

    The loop may have been given fewer threads than it was asked to (OMP_THREAD_LIMIT): then they
    come one after the other, and the first, having waited for long, goes alone.
    """
    if add_done(state, _PRESENT) == num_threads - 1:
        exchange_if_zero(state, _TEAM, _TOGETHER)
    team, patience = load_acquire(state, _TEAM), _PATIENCE
    while team == 0:
        pause()
        patience -= 1
        if patience == 0 and exchange_if_zero(state, _TEAM, _ALONE) == 0:
            _go_through(calls, 0, 1, state, ticks)
            return
        team = load_acquire(state, _TEAM)
    if team == _TOGETHER:
        _go_through(calls, thread, num_threads, state, ticks)


@njit(error_model="numpy")
def _go_through(calls: Any, thread: int, num_threads: int, state: Any, ticks: Any) -> None:
    begin = read_ticks()
    for i in range(len(calls)):
        num_tasks = calls[i, NUM_TASKS]
        for task in range(thread, num_tasks, num_threads):
            call(calls[i, ADDRESS], task, num_tasks, calls[i, ARGUMENTS])
        if num_threads > 1:
            add_done(state, _DONE)
            wait_for(state, _DONE, (i + 1) * num_threads)
        if thread == 0:
            end = read_ticks()
            ticks[i] += end - begin
            begin = end
