"""A loaded model in memory that several processes map: its weights are there once.

The model is pickled; the numbers of its tensors and arrays go to a file that is only memory
(memfd), each once, however many tensors and views stand on it. Who maps it has them without a copy.
The mapping is private: a page that somebody wrote to would become their own, and nothing writes to
weights.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Collection
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import nn

from batchwright.models.causal_lm import CausalLM

ALIGNMENT = 64
"""Of the numbers' addresses: a cache line, and the widest vector."""


def write_model(model: CausalLM, file_descriptor: int, cores: Collection[int] = ()) -> bytes:
    """Write a model's numbers to a file; returns the rest of it, for `map_model`.

    Args:
        file_descriptor: of an empty file, e.g. of os.memfd_create.
        cores: those of the memory node where the numbers shall lie; none: anywhere. Memory is taken
            where the thread runs that touches it first.
    """
    before = os.sched_getaffinity(0)
    rest = io.BytesIO()
    try:
        if cores:
            os.sched_setaffinity(0, cores)
        with open(file_descriptor, "wb", closefd=False) as file:
            _Pickler(rest, file).dump(model)
    finally:
        os.sched_setaffinity(0, before)
    return rest.getvalue()


def map_model(rest: bytes, file_descriptor: int) -> CausalLM:
    """The model that `write_model` wrote, its numbers mapped. The file descriptor may be closed."""
    size = os.fstat(file_descriptor).st_size
    numbers = mmap.mmap(file_descriptor, size, access=mmap.ACCESS_COPY)
    return cast(CausalLM, _Unpickler(io.BytesIO(rest), numbers).load())


class _Pickler(pickle.Pickler):
    """Puts the numbers of tensors and arrays into a file of their own."""

    def __init__(self, rest: BinaryIO, file: BinaryIO) -> None:
        super().__init__(rest, protocol=pickle.HIGHEST_PROTOCOL)
        self._file = file
        self._places: dict[tuple[int, int], int] = {}  # (address, bytes): where in the file
        self._kept: list[Any] = []  # or its address could become another one's

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if isinstance(obj, torch.Tensor):
            values = obj.detach().contiguous()
            place = self._place(values.data_ptr(), values.view(-1).view(torch.uint8).numpy())
            self._kept.append(values)
            kind = "parameter" if isinstance(obj, nn.Parameter) else "tensor"
            return kind, place, str(values.dtype).removeprefix("torch."), tuple(values.shape)
        if isinstance(obj, np.ndarray):
            array = np.ascontiguousarray(obj)
            address = array.__array_interface__["data"][0]
            place = self._place(address, array.reshape(-1).view(np.uint8))
            self._kept.append(array)
            return "array", place, array.dtype.str, array.shape
        return None

    def _place(self, address: int, numbers: np.ndarray) -> int:
        key = address, numbers.nbytes
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            self._places[key] = self._file.tell()
            self._file.write(numbers.data)
        return self._places[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, rest: BinaryIO, numbers: mmap.mmap) -> None:
        super().__init__(rest)
        self._numbers = numbers
        self._loaded: dict[Any, Any] = {}  # what was one object is one again

    def persistent_load(self, pid: Any) -> Any:
        if pid not in self._loaded:
            self._loaded[pid] = self._load(*pid)
        return self._loaded[pid]

    def _load(self, kind: str, place: int, dtype: str, shape: tuple[int, ...]) -> Any:
        count = int(np.prod(shape))
        if kind == "array":
            if not count:
                return np.empty(shape, dtype)
            return np.frombuffer(self._numbers, dtype, count, place).reshape(shape)
        torch_dtype: torch.dtype = getattr(torch, dtype)
        tensor = torch.empty(shape, dtype=torch_dtype)
        if count:
            flat = torch.frombuffer(self._numbers, dtype=torch_dtype, count=count, offset=place)
            tensor = flat.view(shape)
        return nn.Parameter(tensor, requires_grad=False) if kind == "parameter" else tensor
