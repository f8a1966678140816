"""SharedEngine: one engine for the rows of a batch and for single calls.

To a job it is an engine like any other. Single calls come in from other threads through an inbox,
which every step looks into first; they are urgent, so they wait for no row that has not started.
What a step finishes goes to whom it belongs to.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from batchwright.errors import BatchwrightError, RequestError
from batchwright.job.engine_counts import EngineStats
from batchwright.job.runner import EngineLoad, JobEngine
from batchwright.request import Request, Result
from batchwright.watchdog import Watchdog

CALL_PREFIX = "call-"
STOPPING = "the server is stopping"
LOOK_S = 0.25  # between two looks at how busy the engine is


@dataclass(frozen=True, slots=True)
class LoadSeen:
    """How busy an engine was at some moment."""

    num_running_seqs: int = 0
    kv_used_fraction: float = 0.0


class TooManyCallsError(BatchwrightError):
    """As many single calls wait as may."""


class ServerStoppingError(BatchwrightError):
    """The server ends; nothing new is taken."""


@dataclass(eq=False, slots=True)
class Call:
    """A single call's request, and where its result goes."""

    request: Request
    result: Future[Result] = field(default_factory=Future)

    @property
    def num_inputs(self) -> int:
        """A list counts as its entries."""
        return max(len(self.request.parts), 1)


class SharedEngine:
    """See the module docstring. Satisfies `job.runner.JobEngine`.

    `submit`, `withdraw` and the readings may be used from any thread; the rest belongs to the
    thread that owns the engine.

    Args:
        engine: whose owner this is from now on.
        max_calls: single calls that wait or run at once; a list counts as its entries.
        now: the clock, in seconds.
    """

    def __init__(
        self, engine: JobEngine, *, max_calls: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._max_calls = max_calls
        self._now = now
        self._inbox: queue.SimpleQueue[Call | str] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the three below
        self._num_open = 0
        self._is_closed = False
        self._why_closed = STOPPING
        self._calls: dict[str, Call] = {}  # in the engine
        self._rows: set[str] = set()  # of the job that runs, in the engine
        self._watchdog = Watchdog(now, poll_s=None)
        self._last_sign_s = now()
        self._load_at_s = -math.inf
        self.load_seen = LoadSeen()
        """How busy the engine was lately, for other threads; `load` is for its owner."""
        self.arrived = threading.Event()  # there may be something to do

    # From any thread ---------------------------------------------------------------------------

    def submit(self, request: Request) -> Call:
        """Take a single call in.

        Raises:
            TooManyCallsError, ServerStoppingError: it was not taken.
        """
        call = Call(request)
        with self._lock:
            if self._is_closed:
                raise ServerStoppingError(self._why_closed)
            if self._num_open + call.num_inputs > self._max_calls:
                raise TooManyCallsError(
                    f"{self._num_open} calls are waiting or running, at most {self._max_calls} may"
                )
            self._num_open += call.num_inputs
        call.result.add_done_callback(lambda _: self._leave(call))
        self._inbox.put(call)
        self.arrived.set()
        return call

    def withdraw(self, call: Call) -> None:
        """Nobody waits for this call any more."""
        if not call.result.cancel():  # the engine has it
            self._inbox.put(call.request.id)
            self.arrived.set()

    def refuse_calls(self, why: str = STOPPING) -> None:
        """Take no single calls any more, and say why; those that are here are still answered."""
        with self._lock:
            self._is_closed, self._why_closed = True, why

    @property
    def num_open_calls(self) -> int:
        """Single calls that wait or run; a list counts as its entries."""
        return self._num_open

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of progress."""
        return self._now() - self._last_sign_s

    @property
    def is_stuck(self) -> bool:
        """Whether the last sign of progress is older than steps of this engine explain."""
        return self.silent_s > self._watchdog.limit_s

    def alive(self) -> None:
        """A sign of progress from the thread that owns the engine."""
        self._last_sign_s = self._now()
        if self._last_sign_s - self._load_at_s >= LOOK_S:
            self._load_at_s = self._last_sign_s
            load = self._engine.load
            self.load_seen = LoadSeen(load.num_running_seqs, load.kv_used_fraction)

    # What a job sees ---------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence."""
        return self._engine.max_model_len

    @property
    def stats(self) -> EngineStats:
        """Counts since the engine was made, those of single calls included."""
        return self._engine.stats

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        return self._engine.load

    @property
    def num_unfinished(self) -> int:
        """Rows and calls whose results are not there yet."""
        return len(self._rows) + len(self._calls) + self._inbox.qsize()

    def add(self, request: Request) -> None:
        """Take a row of the job in.

        Raises:
            RequestError: it can never run.
        """
        self._engine.add(request)
        self._rows.add(request.id)

    def step(self) -> list[Result]:
        """One step for all; returns the rows of the job that are complete.

        Raises:
            ResourceError: memory does not suffice for one row. Single calls fail with it.
        """
        self._take_inbox()
        self.alive()
        self._watchdog.begin(0, 0)
        try:
            results = self._engine.step()
        except Exception as error:
            self._fail_calls(error)
            raise
        finally:
            self._watchdog.end()
            self.alive()
        return [result for result in results if self._is_row(result)]

    def cancel(self, request_id: str) -> None:
        """End a row now; its result comes out of a later step."""
        self._engine.cancel(request_id)

    def note_earlier(self, request: Request, num_output: int) -> None:
        """A row that was answered before has had so many output tokens."""
        self._engine.note_earlier(request, num_output)

    def waiting_ids(self) -> list[str]:
        """Rows of the job that have not started."""
        return [id for id in self._engine.waiting_ids() if id in self._rows]

    # Between jobs ------------------------------------------------------------------------------

    def abandon(self) -> None:
        """A job has ended, well or not: what it left in the engine is ended too."""
        try:
            for id in self._rows:
                self._engine.cancel(id)
            while self._rows:
                self.step()
        finally:
            self._rows.clear()

    def close(self, why: str = STOPPING) -> None:
        """Fail what is still here, and say why; the engine runs no more."""
        self.refuse_calls(why)
        self._take_inbox()
        self._fail_calls(ServerStoppingError(why))

    # Inside ------------------------------------------------------------------------------------

    def _take_inbox(self) -> None:
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, str):
                if item in self._calls:
                    self._engine.cancel(item)
            elif item.result.set_running_or_notify_cancel():
                self._add_call(item)

    def _add_call(self, call: Call) -> None:
        try:
            self._engine.add(call.request)
        except RequestError as error:
            call.result.set_exception(error)
        else:
            self._calls[call.request.id] = call

    def _is_row(self, result: Result) -> bool:
        """Whether a result is the job's; a single call has its own then, and what was given up is
        dropped."""
        call = self._calls.pop(result.request_id, None)
        if call is not None:
            call.result.set_result(result)
        elif result.request_id in self._rows:
            self._rows.remove(result.request_id)
            return True
        return False

    def _fail_calls(self, error: Exception) -> None:
        for id, call in list(self._calls.items()):
            del self._calls[id]
            with suppress(Exception):  # an engine that fails may fail here too
                self._engine.cancel(id)
            with suppress(InvalidStateError):
                call.result.set_exception(error)

    def _leave(self, call: Call) -> None:
        with self._lock:
            self._num_open -= call.num_inputs
