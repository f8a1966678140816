"""Ranks: the processes that hold one model together, as one of them sees them.

Rank 0 is the process that decides; all compute. The collectives are torch.distributed's, gloo
between CPUs and NCCL between GPUs, on process groups of our own: torch's default group stays free
for the program that uses this package. Every rank must call the same ones in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

TIMEOUT_S = 600.0
"""Longest wait for the other ranks in one collective. A rank that dies is noticed at once, by its
connection; this is for one that hangs. The first step compiles kernels, which takes a minute."""


class LostRanksError(RuntimeError):
    """A collective broke off: another rank is gone, or has given up the step."""


class Ranks:
    """See the module docstring.

    Args:
        rank: of this process, below `size`.
        group: gloo's, or NCCL's with `on_gpu`.
    """

    def __init__(self, rank: int, size: int, group: Any, *, on_gpu: bool) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self._on_gpu = on_gpu

    def span(self, total: int) -> tuple[int, int]:
        """This rank's part [start, end) of so many things; parts differ by at most one."""
        return total * self.rank // self.size, total * (self.rank + 1) // self.size

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on all of them; x, of one shape everywhere, may be overwritten.

        On CPUs level bits for a given number of ranks: parts are gathered and added in the order
        of ranks, in fp32. gloo's own all-reduce starts each piece of a tensor at another rank, so
        with three ranks a row's bits would depend on where in the batch it stands. Between GPUs it
        is NCCL's all-reduce, level rounding.
        """
        if self._on_gpu:
            self._wait(self._group.allreduce, [x])
            return x
        parts = x.new_empty(self.size, *x.shape)
        self._wait(self._group.allgather, [list(parts.unbind())], [x.contiguous()])
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def gather_columns(self, x: torch.Tensor, num_columns: int) -> torch.Tensor:
        """Put the ranks' columns side by side on rank 0.

        Args:
            x: [num_rows, this rank's `span` of num_columns].
        Returns:
            [num_rows, num_columns] on rank 0; elsewhere x, of no use.
        """
        widest = -(-num_columns // self.size)
        padded = F.pad(x, (0, widest - x.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        self._wait(self._group.gather, [parts] if parts else [], [padded], options)
        if not parts:
            return x
        ends = [num_columns * rank // self.size for rank in range(self.size + 1)]
        widths = [end - start for start, end in pairwise(ends)]
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)

    def share(self, x: torch.Tensor) -> None:
        """Overwrite x with that of rank 0."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._wait(self._group.broadcast, [x], options)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers, on all of them."""
        there = torch.tensor([number], device="cuda" if self._on_gpu else "cpu")
        self._wait(self._group.allreduce, [there], dist.ReduceOp.MIN)
        return int(there.item())

    def leave(self) -> None:
        """Give up the step: between CPUs this ends the connections, so that no rank waits for this
        one. `rejoin` makes new ones."""
        self._group = None

    def rejoin(self, store: Path) -> None:
        """Meet the others again, after all have left; see `join`."""
        self._group = join(store, self.rank, self.size, on_gpu=False)._group

    def _wait(self, collective: Callable[..., Any], *arguments: Any) -> None:
        try:
            collective(*arguments).wait()
        except RuntimeError as error:
            raise LostRanksError(str(error)) from error

    def abort(self) -> None:
        """Break off what waits for a rank that is gone. gloo notices by itself."""
        if self._on_gpu:
            self._group.abort()


def join(store: Path, rank: int, size: int, *, on_gpu: bool) -> Ranks:
    """Meet the other ranks, which wait for each other here.

    Args:
        store: a file that does not exist yet, in a directory of this user alone.
        on_gpu: use NCCL and the card that has the rank's number.

    Connections are made on the loopback interface only.
    """
    distributed: Any = dist  # its stubs lack what follows
    meeting = distributed.FileStore(str(store), size)
    if on_gpu:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        torch.cuda.set_device(rank)
        nccl = distributed.ProcessGroupNCCL.Options()
        nccl._timeout = timedelta(seconds=TIMEOUT_S)
        group = distributed.ProcessGroupNCCL(meeting, rank, size, nccl)
    else:
        gloo = distributed.ProcessGroupGloo._Options()
        gloo._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        gloo._timeout = timedelta(seconds=TIMEOUT_S)
        group = distributed.ProcessGroupGloo(meeting, rank, size, gloo)
    return Ranks(rank, size, group, on_gpu=on_gpu)
