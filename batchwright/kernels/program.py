"""Programs: the kernel calls of a computation, recorded once and run again as one parallel loop.

A step of a small model makes some 270 calls. One by one each costs what Python needs for it and
what it takes to wake threads, 20 to 50 us here, which with few rows is as long as the kernels run.
A program is a list of addresses: its threads go through it together and wait for each other, by
spinning, after every call. On a GPU the same is done by CUDA graphs (`exec/device/graphs.py`).

What may be recorded is a computation of nothing but our kernels: between them torch may only take
memory and views. The recorder sees every operation of torch, and refuses if there is another.
Results have the bits of the calls one by one: they are the same calls.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch.utils._python_dispatch import TorchDispatchMode

from batchwright.kernels import get_num_threads
from batchwright.kernels.parallel import (
    Task,
    add_done,
    call,
    exchange_if_zero,
    load_acquire,
    pause,
    read_ticks,
    recorded,
    store_arguments,
    wait_for,
)

ARGUMENT_BYTES = 2048
"""Room for the arguments of one call."""

MAX_RECORDED_BYTES = 64 * 2**20
"""Most memory between calls while they are recorded; run again, they share a small part of it."""

CACHE_LINE_BYTES = 64

ADDRESS, NUM_TASKS, ARGUMENTS, TICKS = range(4)
"""Columns of a program's list of calls. Ticks of the processor's clock are added up."""


class CannotRecord(Exception):
    """The computation does something that a program could not do again, or needs much memory."""


class Program:
    """Calls that are run again, on the same memory.

    Attributes:
        result: what the recorded function returned; overwritten by every run.
        names: of the calls' kernels.
        ticks: [num_calls] int64, what each call took so far, in ticks of the processor's clock.
    """

    def __init__(
        self, calls: list[_Call], memory: Any, counters: Any, result: torch.Tensor
    ) -> None:
        self.result = result
        self.names = [one.task.name for one in calls]
        self._held = calls, memory
        self._counters = counters
        self._arguments = np.zeros((len(calls), ARGUMENT_BYTES // 8), np.int64)
        self._calls = np.zeros((len(calls), 4), np.int64)
        self._state = np.zeros((3, CACHE_LINE_BYTES // 8), np.int64)
        for line, place, one in zip(self._calls, self._arguments, calls, strict=True):
            at = place.ctypes.data
            if store_arguments(at, ARGUMENT_BYTES, *one.args) > ARGUMENT_BYTES:
                raise CannotRecord(f"arguments of {one.task.name} take too much room")
            line[:TICKS] = one.task.address, one.num_tasks, at

    @property
    def ticks(self) -> Any:
        return self._calls[:, TICKS]

    def run(self) -> torch.Tensor:
        """Make all calls, one after the other."""
        self._counters[:] = 0
        self._state[:] = 0
        _run(self._calls, get_num_threads(), self._state)
        return self.result


def record(compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Program]:
    """The result of a computation, and a program that makes its calls again.

    Memory that the computation takes is the program's own, and none that it had before is given
    back. Everything else that the calls read or write must stay where it is.

    Raises:
        CannotRecord: nothing is lost but time.
    """
    recorder = _Recorder()
    with recorder, recorded(recorder):
        result = compute()
    return result, recorder.program(result)


class _Piece:
    """Memory that was taken while recording."""

    def __init__(self, owner: Any, address: int, num_bytes: int, *, is_counter: bool) -> None:
        self.owner = owner
        self.address, self.num_bytes = address, num_bytes
        self.is_counter = is_counter
        self.first_use = self.last_use = -1
        self.offset = 0


class _Call(NamedTuple):
    task: Task
    num_tasks: int
    args: tuple[Any, ...]


class _Recorder(TorchDispatchMode):
    """Notes calls of kernels and memory that torch gives out."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []
        self._pieces: list[_Piece] = []
        self._num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        if func is not torch.ops.aten.empty.memory_format:
            raise CannotRecord(f"torch computes {func}")
        self._add_piece(result, result.data_ptr(), result.nbytes, is_counter=False)
        return result

    def add(self, task: Task, num_tasks: int, args: tuple[Any, ...]) -> None:
        self._calls.append(_Call(task, num_tasks, args))

    def note(self, array: Any, *, is_counter: bool = False) -> None:
        self._add_piece(array, array.ctypes.data, array.nbytes, is_counter=is_counter)

    def _add_piece(self, owner: Any, address: int, num_bytes: int, *, is_counter: bool) -> None:
        # Pieces are held, so that no two have the same place.
        self._pieces.append(_Piece(owner, address, num_bytes, is_counter=is_counter))
        self._num_bytes += num_bytes
        if self._num_bytes > MAX_RECORDED_BYTES:
            raise CannotRecord("it takes too much memory between calls")

    def program(self, result: torch.Tensor) -> Program:
        """The calls so far, with memory between them as small as can be."""
        self._pieces.sort(key=lambda piece: piece.address)
        for i, one in enumerate(self._calls):
            for arg in one.args:
                piece = self._piece_of(arg) if isinstance(arg, np.ndarray) else None
                if piece is not None:
                    piece.first_use = i if piece.first_use < 0 else piece.first_use
                    piece.last_use = i
        last = self._piece_of(result.numpy())
        if last is None:
            raise CannotRecord("its result lies in memory that it did not take")
        last.last_use = len(self._calls)
        used = [piece for piece in self._pieces if piece.first_use >= 0]
        memory = _lines(_place([piece for piece in used if not piece.is_counter]))
        counters = _lines(_place_apart([piece for piece in used if piece.is_counter]))

        def moved(arg: Any) -> Any:
            piece = self._piece_of(arg) if isinstance(arg, np.ndarray) else None
            if piece is None:
                return arg
            offset = piece.offset + arg.ctypes.data - piece.address
            buffer = counters if piece.is_counter else memory
            return np.ndarray(arg.shape, arg.dtype, buffer.view(np.uint8), offset, arg.strides)

        calls = [_Call(*one[:2], tuple(moved(arg) for arg in one.args)) for one in self._calls]
        return Program(calls, memory, counters, torch.from_numpy(moved(result.numpy())))

    def _piece_of(self, array: np.ndarray) -> _Piece | None:
        """The sorted piece that an array lies in."""
        address = array.ctypes.data
        i = bisect.bisect_right(self._pieces, address, key=lambda piece: piece.address) - 1
        if i < 0 or not array.size:
            return None
        piece = self._pieces[i]
        return piece if address < piece.address + piece.num_bytes else None


def _place(pieces: list[_Piece]) -> int:
    """Give each piece the lowest place that is free as long as it is used; bytes for all."""
    total = 0
    placed: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.first_use):
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


def _lines(num_bytes: int) -> Any:
    """Zeros, int64, that begin on a cache line."""
    array = np.zeros(num_bytes // 8 + 2 * CACHE_LINE_BYTES // 8, np.int64)
    start = -array.ctypes.data % CACHE_LINE_BYTES // 8
    return array[start : start + _up(num_bytes) // 8]


# --- running --------------------------------------------------------------------------------------

_PRESENT, _TEAM, _DONE = (line * CACHE_LINE_BYTES // 8 for line in range(3))
_TOGETHER, _ALONE = 1, 2
_PATIENCE = 50_000_000
"""Pauses, some seconds, after which a thread that is still the only one does everything."""


@njit(cache=True, parallel=True, error_model="numpy")
def _run(calls: Any, num_threads: int, state: Any) -> None:
    flat = state.reshape(-1)
    if num_threads == 1:
        _go_through(calls, 0, 1, flat)
    else:
        for thread in prange(num_threads):
            _join(calls, thread, num_threads, flat)


@njit(error_model="numpy")
def _join(calls: Any, thread: int, num_threads: int, state: Any) -> None:
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
            _go_through(calls, 0, 1, state)
            return
        team = load_acquire(state, _TEAM)
    if team == _TOGETHER:
        _go_through(calls, thread, num_threads, state)


@njit(error_model="numpy")
def _go_through(calls: Any, thread: int, num_threads: int, state: Any) -> None:
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
            calls[i, TICKS] += end - begin
            begin = end
