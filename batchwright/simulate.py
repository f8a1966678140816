"""A run of the real scheduler on a pretended model and a virtual clock.

Steps that are equal but for one more token a row are charged at once (`sched/equal_steps.py`), so
a run takes time by its changes, rows that start and end, and hardly by its Steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from batchwright.clock import VirtualClock
from batchwright.exec.sim import SimExecutor, StepCost
from batchwright.kv.groups import KVGroup, blocks_per_sequence
from batchwright.plan.length_predictor import find_predictor
from batchwright.plan.order import OrderFunction
from batchwright.plan.orders.fcfs import fcfs
from batchwright.sched.scheduler import Scheduler
from batchwright.sched.work import Work
from batchwright.sequence import Sequence
from batchwright.step import NewSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """The sizes of an engine; arguments as those of `Scheduler`.

    Attributes:
        horizon: rows it has at once; None: all.
        length_predictor: a file of `plan/lengths`.
    """

    groups: Seq[KVGroup]
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefix_sharing: bool = True
    horizon: int | None = None
    order: OrderFunction = fcfs
    length_predictor: str = "subtree"

    def scheduler(self) -> Scheduler:
        """A scheduler of these sizes."""
        return Scheduler(
            self.groups,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            prefix_sharing=self.prefix_sharing,
            order=self.order,
            lengths=find_predictor(self.length_predictor),
        )

    def most_at_once(self, num_tokens: int) -> int:
        """Sequences of so many tokens that memory holds, if they share nothing; may be 0."""
        return min(group.num_blocks // self._need(group, num_tokens) for group in self.groups)

    def rows_at_once(self, num_tokens: int) -> int:
        """Sequences of so many tokens that run at once, if they share nothing."""
        return max(1, min(self.max_num_seqs, self.most_at_once(num_tokens)))

    def _need(self, group: KVGroup, num_tokens: int) -> int:
        return blocks_per_sequence(
            group.window, max(num_tokens, 1), self.block_size, self.max_num_batched_tokens
        )

    def scaled(self, share: float, longest: int) -> EngineSizes:
        """A part of this engine that still runs a sequence of `longest` tokens."""
        num_seqs = max(round(share * self.max_num_seqs), 1)
        num_tokens = max(round(share * self.max_num_batched_tokens), num_seqs)
        groups = []
        for group in self.groups:
            alone = blocks_per_sequence(group.window, longest, self.block_size, num_tokens)
            num_blocks = max(round(share * group.num_blocks), alone)
            num_host_blocks = round(share * group.num_host_blocks)
            groups.append(KVGroup(group.window, num_blocks, num_host_blocks))
        return replace(
            self,
            groups=groups,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_tokens,
            max_model_len=max(self.max_model_len, longest),
        )


@dataclass(frozen=True, slots=True)
class Moment:
    """Time, and all that was computed until then.

    Attributes:
        num_draws: tokens drawn.
    """

    seconds: float
    work: Work
    num_draws: int


class Simulation:
    """One simulated run.

    Args:
        families: the first sequence of each row, with its siblings.
        output_length: see `SimExecutor`.
        watch: told after every round.

    Attributes:
        num_rounds: Steps made, those charged at once counted as one.
        started: the moment when the last row had started.
        max_running: sequences that ran at once, at most.
    """

    def __init__(
        self,
        families: Iterator[Sequence],
        engine: EngineSizes,
        cost: StepCost,
        output_length: Callable[[NewSequence], int | None] = lambda sequence: None,
        watch: Callable[[Simulation], None] = lambda simulation: None,
    ) -> None:
        self.clock = VirtualClock()
        self.scheduler = engine.scheduler()
        self.num_rounds = self.max_running = 0
        self.started = self.now()
        self._families, self._watch = families, watch
        self._horizon = engine.horizon or math.inf
        self._executor = SimExecutor(self.clock, cost, output_length)
        self._unfinished: Counter[str] = Counter()
        self._ended = False

    def now(self) -> Moment:
        """The present moment."""
        stats = self.scheduler.stats
        return Moment(self.clock.now(), stats.work.copy(), stats.num_generated_tokens)

    def run(self) -> None:
        """Until all rows are done."""
        self._read()
        while self._round():
            self._read()

    def _round(self) -> bool:
        """One Step, or several equal ones; False: there is nothing left to do."""
        scheduler = self.scheduler
        if not self._ended or scheduler.books.slots.num_running < scheduler.num_unfinished:
            self.started = self.now()
        steps = scheduler.steps_until_change()
        if steps is not None:
            update = scheduler.skip(steps, self._executor.execute_equal(steps))
        else:
            step = scheduler.schedule()
            if step is None:
                return False
            self.max_running = max(self.max_running, scheduler.books.slots.num_running)
            update = scheduler.update(self._executor.execute(step))
        self.num_rounds += 1
        self._watch(self)
        for sequence in update.finished:
            self._finish(sequence.request.id)
        return True

    @property
    def peak_kv_fraction(self) -> float:
        """Share of the blocks of the fullest KV group that were in use at once, at most."""
        pools = [table.pool for table in self.scheduler.books.tables]
        return max(1 - pool.least_free / pool.num_blocks for pool in pools)

    def _read(self) -> None:
        while not self._ended and len(self._unfinished) < self._horizon:
            first = next(self._families, None)
            if first is None:
                self._ended = True
                return
            self.scheduler.add(first)
            self._unfinished[first.request.id] = 1 + len(first.siblings)

    def _finish(self, request_id: str) -> None:
        self._unfinished[request_id] -= 1
        if not self._unfinished[request_id]:
            del self._unfinished[request_id]
