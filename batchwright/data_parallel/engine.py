"""ReplicatedEngine: replicas of an engine, which look like one engine to whoever gives them rows.

It has the interface of `Engine`. Rows wait here (`row_queue.py`) until a replica has less to begin
than two steps hold; so replicas always have work, and a row is bound to one as late as possible.
Nothing is computed here, and what a row's answer is does not depend on the replica.

When a replica is gone, however it ended, its rows wait again. A row that ran in two replicas when
they ended fails; it may be what ended them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from batchwright.data_parallel.messages import (
    Abandon,
    Add,
    Cancel,
    Failed,
    Logged,
    NoteEarlier,
    Report,
)
from batchwright.data_parallel.replicas import Replicas
from batchwright.data_parallel.row_queue import Row, RowQueue, expected_output
from batchwright.data_parallel.totals import add_counts
from batchwright.engine import HORIZON, EngineLoad
from batchwright.errors import ConfigError, ReplicaError, RequestError
from batchwright.limits import ModelLimits
from batchwright.outputs import cancelled, failed
from batchwright.plan.order import OrderFunction
from batchwright.plan.shape import ModelShape
from batchwright.request import Request, Result, Task
from batchwright.run_through import run_through
from batchwright.sched.intake import SchedulerStats
from batchwright.structured.compile import GrammarCompiler

logger = logging.getLogger(__name__)

WAIT_S = 0.1
"""How long `step` waits for news."""

STEPS_AHEAD = 2
"""Steps for which a replica has rows to begin, as far as their prompts go."""

MOST_AHEAD = 32
"""Rows that wait in a replica, at most; rows with short prompts fill a step in large numbers."""

MAX_DEATHS = 2


class _Replica:
    """What is known of a replica that is not gone."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}  # given to it, without a result
        self.not_taken: list[str] = []  # of these, the last ones, which it has not taken in yet
        self.num_given = 0
        self.report = Report()

    @property
    def work(self) -> float:
        """What it has been given and not finished."""
        return sum(row.work for row in self.rows.values())

    @property
    def waiting(self) -> list[str]:
        """Rows that have not started there, as far as is known."""
        return [id for id in (*self.report.waiting_ids, *self.not_taken) if id in self.rows]

    def forget_rows(self) -> None:
        """It is to end everything."""
        self.rows.clear()
        self.not_taken.clear()
        self.num_given = 0
        self.report = self.report._replace(
            waiting_ids=(), num_running_seqs=0, num_waiting_seqs=0, kv_used_fraction=0.0
        )


class ReplicatedEngine:
    """See the module docstring.

    Args:
        replicas: ready to run.
        queue: where rows wait for them.
        limits: what the model allows of a request.
        max_num_batched_tokens: of a replica's step.
        grammars: for whoever prepares rows; replicas have their own.
        shape: the model's sizes, for reports.
        order: the order of lines of a long file (`job/file_job.py`).
    """

    def __init__(
        self,
        replicas: Replicas,
        queue: RowQueue,
        limits: ModelLimits,
        *,
        max_num_batched_tokens: int,
        grammars: GrammarCompiler,
        shape: ModelShape,
        order: OrderFunction,
    ) -> None:
        self.replicas = replicas
        self.grammars, self.shape, self.order = grammars, shape, order
        self.stats = SchedulerStats()
        """Counts since the start, of all replicas."""
        self._queue = queue
        self._limits = limits
        self._tokens_ahead = STEPS_AHEAD * max_num_batched_tokens
        self._alive = {number: _Replica() for number in range(len(replicas))}
        self._open: dict[str, Row] = {}  # all requests whose result has not been returned
        self._done: dict[str, Result] = {}  # results that have not been returned; they leave last
        self._epoch = self._num_added = 0
        self._is_running = self._is_torn = False
        self._num_output = self._num_allowed = 0.0  # tokens, of rows that have ended
        self._compile_s: dict[int, float] = {}
        self._own_bytes: dict[int, int] = {}
        self._last_end = ""

    # What is asked ----------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt and output."""
        return self._limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._limits.vocab_size

    @property
    def num_unfinished(self) -> int:
        """Requests added whose result has not been returned."""
        return len(self._open)

    @property
    def load(self) -> EngineLoad:
        """How busy the replicas are, by their last reports; the share of memory is the highest."""
        reports = [replica.report for replica in self._alive.values()]
        on_their_way = [
            replica.rows[id]
            for replica in self._alive.values()
            for id in replica.not_taken
            if id in replica.rows
        ]
        num_here = sum(row.request.params.n for row in (*self._queue.rows, *on_their_way))
        return EngineLoad(
            num_running_seqs=sum(report.num_running_seqs for report in reports),
            num_waiting_seqs=num_here + sum(report.num_waiting_seqs for report in reports),
            kv_used_fraction=max((report.kv_used_fraction for report in reports), default=0.0),
            helper_bytes=sum(self._own_bytes.values()),
        )

    @property
    def compile_s(self) -> float:
        """Seconds that the replica which took longest has spent compiling kernels."""
        return max(self._compile_s.values(), default=0.0)

    def waiting_ids(self) -> list[str]:
        """Requests that have not started, as far as is known."""
        there = [id for replica in self._alive.values() for id in replica.waiting]
        return [*(row.request.id for row in self._queue.rows), *there]

    def check_integrity(self) -> None:
        """Raise AssertionError if a request is nowhere, or in two places."""
        places = [*(row.request.id for row in self._queue.rows), *self._done]
        for replica in self._alive.values():
            places += replica.rows
        assert len(places) == len(set(places)) and set(places) == set(self._open)

    # What is done -----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take a request in; its result comes out of a later `step`.

        Raises:
            RequestError: it can never run, as far as is known here; other reasons are in its
                result.
        """
        self._mend()
        if request.id in self._open:
            raise RequestError(
                f"id {request.id!r} is already running; ids must be unique",
                code="duplicate_custom_id",
            )
        if not request.parts:
            self._limits.check(request)
        share = self._num_output / self._num_allowed if self._num_allowed else 1.0
        row = Row(request, self._num_added, expected_output(request, self.max_model_len, share))
        self._num_added += 1
        self._open[request.id] = row
        if request.urgent and self._alive:
            self._give(min(self._alive, key=lambda number: self._alive[number].work), [row])
        else:
            self._queue.add(row)

    def note_earlier(self, request: Request, num_output: int) -> None:
        """A request that is not run here has had so many output tokens a sequence."""
        for number in self._alive:
            self.replicas.send(number, NoteEarlier(request, num_output))

    def step(self) -> list[Result]:
        """Wait a moment for news of the replicas; returns the results that have come.

        Raises:
            ReplicaError: no replica is left. Nothing is lost, but nothing can run any more.
        """
        self._mend()
        self._is_torn = True
        self._hand_out()
        if not self._done and self._alive:
            self.replicas.inbox.wait(WAIT_S)
        messages = self.replicas.inbox.messages
        while messages:
            self._take(*messages[0])
            messages.popleft()
        self._hand_out()
        self._is_torn = False
        if not self._alive and not self._done:
            raise self._all_gone()
        done = list(self._done.values())
        for result in done:
            del self._open[result.request_id]
        self._done = {}
        return done

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """See `Engine.run`.

        Raises:
            ConfigError: another run of this engine is not finished.
        """
        if self._open or self._is_running:
            raise ConfigError(
                "this engine is still running other requests; finish or close their results first"
            )
        self._is_running = True
        try:
            yield from run_through(self, requests, HORIZON)
        finally:
            self._is_running = False
            self.abandon()

    def cancel(self, request_id: str) -> None:
        """End a request now; its result, with what there is of it, comes out of a later `step`."""
        self._mend()
        if request_id in self._queue:
            row = self._queue.remove(request_id)
            self._done[request_id] = _cancelled(row.request)
            return
        for number, replica in self._alive.items():
            if request_id in replica.rows:
                self.replicas.send(number, Cancel(request_id))

    def abandon(self) -> None:
        """End everything; nobody reads the results. The engine can be used again."""
        if self._open:
            self._end_all()
        self._open.clear()
        self._done.clear()
        self._is_torn = False

    def close(self) -> None:
        """End the replicas."""
        self.grammars.close()
        self.replicas.close()

    # Inside -----------------------------------------------------------------------------------

    def _mend(self) -> None:
        """After an interrupted step, begin anew with what has not been answered."""
        if not self._is_torn:
            return
        self._end_all()
        self._queue.add_again(row for id, row in self._open.items() if id not in self._done)
        self._is_torn = False

    def _end_all(self) -> None:
        """Let replicas end what they have; what they still say of it is not listened to."""
        self._epoch += 1
        self._queue.clear()
        for number, replica in self._alive.items():
            replica.forget_rows()
            self.replicas.send(number, Abandon(self._epoch))

    def _hand_out(self) -> None:
        """Give rows to replicas that soon have none to begin, one by one to the least loaded."""
        given: dict[int, list[Row]] = {}
        loads = {number: replica.work for number, replica in self._alive.items()}
        room = {number: self._room(replica) for number, replica in self._alive.items()}
        while len(self._queue):
            wants = [number for number, (tokens, rows) in room.items() if tokens > 0 and rows > 0]
            if not wants:
                break
            number = min(wants, key=lambda number: loads[number])
            row = self._queue.take(number, loads)
            if row is None:
                break
            given.setdefault(number, []).append(row)
            loads[number] += row.work
            room[number] = room[number][0] - row.num_own, room[number][1] - 1
        for number, rows in given.items():
            self._give(number, rows)

    def _room(self, replica: _Replica) -> tuple[float, int]:
        """(prompt tokens, rows) that a replica may have besides what waits there."""
        waiting = replica.waiting
        num_tokens = sum(replica.rows[id].num_own for id in waiting)
        return self._tokens_ahead - num_tokens, MOST_AHEAD - len(waiting)

    def _give(self, number: int, rows: list[Row]) -> None:
        replica = self._alive[number]
        for row in rows:
            replica.rows[row.request.id] = row
            replica.not_taken.append(row.request.id)
        replica.num_given += len(rows)
        self.replicas.send(number, Add([row.request for row in rows]))

    def _take(self, number: int, message: Any) -> None:
        """Handle a message. Done twice, after an interrupt, it changes nothing more."""
        if isinstance(message, Logged):
            logger.log(message.level, "replica %d: %s", number, message.text)
        elif isinstance(message, Failed):
            self._lose(number, message.text)
        elif isinstance(message, Report) and number in self._alive:
            replica = self._alive[number]
            add_counts(self.stats, message.counts.since(replica.report.counts))
            self._compile_s[number] = message.compile_s
            self._own_bytes[number] = max(self._own_bytes.get(number, 0), message.own_bytes)
            if message.epoch != self._epoch:
                replica.report = replica.report._replace(counts=message.counts)
                return
            replica.report = message._replace(results=())
            num_not_taken = replica.num_given - message.num_taken
            replica.not_taken = replica.not_taken[len(replica.not_taken) - num_not_taken :]
            for result in message.results:
                row = replica.rows.pop(result.request_id, None)
                if row is not None:
                    self._finish(row, result)

    def _finish(self, row: Row, result: Result) -> None:
        self._done[result.request_id] = result
        if result.error is None and row.request.task is Task.GENERATE:
            self._num_output += sum(len(output.token_ids) for output in result.outputs)
            self._num_allowed += expected_output(row.request, self.max_model_len, 1.0)

    def _lose(self, number: int, how: str) -> None:
        """A replica is gone: its rows wait again, or fail if this is the second time."""
        replica = self._alive.pop(number, None)
        if replica is None:
            return
        self._last_end = f"replica {number} {how}"
        self._queue.drop_replica(number)
        waiting = set(replica.waiting)
        for id, row in replica.rows.items():
            row.num_deaths += id not in waiting
        lost = [row for row in replica.rows.values() if row.num_deaths >= MAX_DEATHS]
        again = [row for row in replica.rows.values() if row.num_deaths < MAX_DEATHS]
        self._queue.add_again(again)
        for row in lost:
            self._done[row.request.id] = failed(row.request, _lost_error(self._last_end))
        logger.warning(
            "%s; %d of %d replicas go on with its %d unfinished rows%s",
            self._last_end,
            len(self._alive),
            len(self.replicas),
            len(again),
            f", {len(lost)} rows that ran in two replicas when they ended fail" if lost else "",
        )

    def _all_gone(self) -> ReplicaError:
        num = len(self.replicas)
        return ReplicaError(
            f"{self._last_end}; none of {num} replicas (data_parallel_size) is left, so nothing "
            "more is computed; finished rows are kept, start it again to go on"
        )


def _cancelled(request: Request) -> Result:
    """The result of a request that was cancelled here."""
    if request.parts:
        return failed(request, RequestError("the request was cancelled", code="cancelled"))
    return cancelled(request)


def _lost_error(how: str) -> RequestError:
    return RequestError(
        f"two replicas ended while the row ran in them, the last so: {how}; run it again with one "
        "process, and report it if it fails again",
        code="internal_error",
    )
