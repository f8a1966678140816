"""Ranks in which rows fail that begin with three times the same token: which, says the token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchwright.exec.local import LocalExecutor
from batchwright.sampling.state import SamplingState
from batchwright.tensor_parallel import follower_process
from batchwright.tensor_parallel.ranks import Ranks

PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from tests.tensor_parallel.failing import main; main(int(sys.argv[1]))"
)
RANK_0, RANK_1, ALL_RANKS, DRAWING, MEMORY = 90, 91, 92, 93, 94
FAILS_ON = {RANK_0: (0,), RANK_1: (1,), ALL_RANKS: (0, 1), MEMORY: (1,)}
SUMS_BEFORE = 3  # within a layer


def break_rows(is_follower: bool, replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let rows fail in this process, between two collectives or when tokens are drawn."""
    forward, add_up, sample = LocalExecutor._forward, Ranks.sum, SamplingState.sample
    now = {"token": -1, "num_sums": 0}

    def mark(self, step):
        starts = step.cu_seqlens_q[:-1]
        first = [step.token_ids[s : s + 3].tolist() for s in starts if step.positions[s] == 0]
        bad = [ids[0] for ids in first if len(set(ids)) == 1 and ids[0] >= RANK_0]
        now.update(token=bad[0] if bad else -1, num_sums=0)
        return forward(self, step)

    def fail_between(self, x):
        now["num_sums"] += 1
        if now["num_sums"] > SUMS_BEFORE and self.rank in FAILS_ON.get(now["token"], ()):
            if now["token"] == MEMORY and now["num_sums"] == SUMS_BEFORE + 1 and len(x) > 20:
                raise MemoryError("no room")
            if now["token"] != MEMORY:
                raise ValueError(f"a bug on rank {self.rank}")
        return add_up(self, x)

    def fail_drawing(self, *arguments):
        if now["token"] == DRAWING:
            raise ValueError("a bug in drawing")
        return sample(self, *arguments)

    replace(LocalExecutor, "_forward", mark)
    replace(Ranks, "sum", fail_between)
    if not is_follower:
        replace(SamplingState, "sample", fail_drawing)


def main(file_descriptor: int) -> None:
    """What the other process runs."""
    break_rows(is_follower=True)
    follower_process.main(file_descriptor)
