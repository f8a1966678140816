"""Followers: the processes of ranks 1, 2, ..., started and watched by rank 0.

Each has a socket to rank 0 (`child_process.py`), over which it gets what to load and then every
Step, and says that it is ready or why it fails. torch.distributed's broadcast is not used for that:
sizes need not be known, no timeout runs while a server has nothing to do, and the socket's end
tells at once that the other process is gone.
"""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batchwright.child_process import ChildProcess, end_children, start_child
from batchwright.config import ResolvedConfig
from batchwright.errors import RankError
from batchwright.recovery import describe
from batchwright.step import Step
from batchwright.tensor_parallel.ranks import LostRanksError, Ranks, join
from batchwright.tensor_parallel.step_message import encode_step

ORDER, STEP = b"order: {", b"step: .."
"""What the first eight bytes of a message say: JSON, or an encoded Step; from a follower, why it
has failed, as JSON."""

READY = b"ready"

CAUSE_S = 3.0
"""How long after a failed step a follower may need to say why. Those that lost their neighbour fail
too, so what comes first need not be the cause."""

MEET_S = 60.0
"""Longest wait, after a failed step, for the followers to give it up: they notice at their next
collective, which is a layer away."""

# As in structured/worker.py: our search path, and the main module is not run again.
PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from batchwright.tensor_parallel.follower_process import main; main(int(sys.argv[1]))"
)


class _Reports:
    """What followers have said. A thread for each writes here; it ends with its follower."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.num_ready = 0
        self.failures: list[tuple[bool, str]] = []  # (it died without a word, what is told)
        self.step_causes: list[Exception] = []  # why followers could not compute a step
        self.ranks: Ranks | None = None

    def listen(self, follower: ChildProcess) -> None:
        """Until the follower fails or ends."""
        was_told = True
        try:
            while True:
                message = follower.connection.recv_bytes()
                if message == READY:
                    with self.changed:
                        self.num_ready += 1
                        self.changed.notify_all()
                elif message.startswith(STEP):
                    self._note_step(follower.number, json.loads(message[len(STEP) :]))
                else:
                    break
            text = f"failed: {message.decode()}"
        except (EOFError, OSError):
            was_told, text = False, follower.how_it_ended()
        with self.changed:
            self.failures.append((not was_told, f"rank {follower.number} {text}"))
            self.changed.notify_all()
        if self.ranks is not None:
            self.ranks.abort()

    def _note_step(self, rank: int, report: dict[str, Any]) -> None:
        if report["is_cause"]:
            kind = MemoryError if report["is_memory"] else RuntimeError
            self.step_causes.append(kind(f"rank {rank}: {report['text']}"))


class Followers:
    """Started by the constructor, ended by `close`, by garbage collection or with this process.

    Args:
        size: ranks, with this one.
        on_gpu: each has the card of its rank; else all are on this machine's processor.
    Raises:
        RankError: one could not be started.

    Attributes:
        ranks: all of them, as rank 0 sees them.
    """

    def __init__(self, size: int, *, on_gpu: bool) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="batchwright-ranks-"))  # for this user alone
        self._reports = _Reports()
        self._followers = [start_child(rank, self._directory, PROGRAM) for rank in range(1, size)]
        self._end = weakref.finalize(self, end_children, self._followers, self._directory)
        self._failure: str | None = None
        self._on_gpu, self._num_meetings = on_gpu, 0
        for follower in self._followers:
            threading.Thread(target=self._reports.listen, args=(follower,), daemon=True).start()
        try:
            self._wait_ready()
            store = self._directory / "store"
            for follower in self._followers:
                self._order(follower, join=[str(store), follower.number, size], on_gpu=on_gpu)
            self.ranks = self._reports.ranks = join(store, 0, size, on_gpu=on_gpu)
        except Exception as error:
            raise self.failure(error) from error
        except BaseException:
            self.close()
            raise

    def load(self, model: Path, config: ResolvedConfig) -> None:
        """Let all load their part of a model; `start` lets them go on."""
        for follower in self._followers:
            self._order(follower, model=str(model), config=asdict(config))

    def start(self) -> None:
        """Wait until all have loaded, and let them make their executors.

        Collectives begin there, and loading may take longer than they wait for one another.

        Raises:
            RankError: one has failed.
        """
        try:
            self._wait_ready()
            for follower in self._followers:
                self._order(follower, start=True)
        except (OSError, RankError) as error:
            raise self.failure(error) from None

    def send(self, step: Step) -> None:
        """Let all compute a Step.

        Raises:
            RankError: one has failed, now or earlier.
        """
        self.check()
        message = STEP + encode_step(step)
        try:
            for follower in self._followers:
                follower.connection.send_bytes(message)
        except OSError as error:
            raise self.failure(error) from error

    def give_up_step(self, error: Exception) -> Exception:
        """A step failed on rank 0, or broke off there: let all ranks give it up and meet again.

        Leaving ends the connections of a rank, so that all others break off the collective in
        which they wait for it, and leave too. Steps before this one are complete on every rank, as
        far as anybody relies on them: what rank 0 has drawn depends on all their keys and values.

        Returns:
            Why the step failed, when all are together again. RankError, and all followers are
            ended: between GPUs; if one is gone or does not come; if no rank knows a cause.
        """
        reports = self._reports
        if self._on_gpu or self._failure is not None:
            return self.failure(error)
        self._num_meetings += 1
        store = self._directory / f"store-{self._num_meetings}"
        try:
            self.ranks.leave()
            for follower in self._followers:
                self._order(follower, rejoin=str(store))
            self._wait_ready(MEET_S)  # each has told its cause before
            causes = [] if isinstance(error, LostRanksError) else [error]
            causes += reports.step_causes
            reports.step_causes.clear()
            if not causes:
                return self.failure(error)
            self.ranks.rejoin(store)
        except Exception:  # noqa: BLE001 - whatever it is, they do not come together
            return self.failure(error)
        return causes[0]

    def check(self) -> None:
        """Raise RankError if one has failed."""
        if self._failure is not None:
            raise RankError(self._failure)
        if self._reports.failures:
            raise self.failure(RankError("a rank is gone"))

    def failure(self, error: BaseException) -> RankError:
        """Why something failed on rank 0, the followers' reasons before its own; ends them all.

        It is the same for ever after: what ranks have computed no longer fits together.
        """
        if self._failure is None:
            reports = self._reports
            with reports.changed:
                reports.changed.wait_for(lambda: reports.failures, CAUSE_S)
                reports.changed.wait_for(lambda: any(died for died, _ in reports.failures), 0.2)
                failures = sorted(reports.failures, key=lambda failure: not failure[0])
            size = len(self._followers) + 1
            cause = failures[0][1] if failures else f"rank 0 failed: {describe(error)}"
            self._failure = (
                f"{cause}; all {size} ranks of a divided model (tensor_parallel_size) are needed, "
                "so nothing more is computed; finished rows are kept, start it again to go on"
            )
            self.close()
        return RankError(self._failure)

    def close(self) -> None:
        """End them at once: they have nothing to lose."""
        self._failure = self._failure or "this model has been closed; load it again"
        self._end()

    def _order(self, follower: ChildProcess, **what: Any) -> None:
        follower.connection.send_bytes(ORDER + json.dumps(what).encode()[1:])

    def _wait_ready(self, timeout_s: float | None = None) -> None:
        reports, wanted = self._reports, len(self._followers)
        with reports.changed:
            reports.changed.wait_for(
                lambda: reports.failures or reports.num_ready == wanted, timeout_s
            )
            if reports.failures or reports.num_ready != wanted:
                raise RankError("a rank is gone, or does not answer")
            reports.num_ready = 0
