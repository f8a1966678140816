"""Replicas: processes with a whole engine each, started and watched by this one.

Each has a socket to this process. A thread reads what it says and another writes what it is told,
so that an interrupt of the main thread cuts no message in two.
"""

from __future__ import annotations

import os
import pickle
import queue
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchwright.child_process import ChildProcess, end_children, start_child
from batchwright.data_parallel.cores import Place
from batchwright.data_parallel.messages import Failed, Ready
from batchwright.errors import ReplicaError

# Pinned before anything is imported: threads and memory then belong to those cores.
PROGRAM = (
    "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[3].split(','))); "
    "sys.path[:] = sys.argv[4:]; "
    "from batchwright.data_parallel.replica_process import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]))"
)


class Inbox:
    """What replicas have said, in the order in which it came: (number, message).

    Attributes:
        changed: to wait for something new.
        messages: whoever has handled one removes it; an interrupt before that loses nothing.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.messages: deque[tuple[int, Any]] = deque()

    def put(self, number: int, message: Any) -> None:
        """Say something; from any thread."""
        with self.changed:
            self.messages.append((number, message))
            self.changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until there is something; False: the time is up."""
        with self.changed:
            return bool(self.changed.wait_for(lambda: self.messages, timeout_s))


class Replicas:
    """Started by the constructor, ended by `close`, by garbage collection or with this process.

    Args:
        places: where each runs.
    Raises:
        OSError: one could not be started.

    Attributes:
        inbox: what they say. The last message of each is a Failed.
        model_fds: by memory node, the file that is for the model's numbers there.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.inbox = Inbox()
        self._directory = Path(tempfile.mkdtemp(prefix="batchwright-replicas-"))  # this user's
        self._children: list[ChildProcess] = []
        self._outboxes: list[queue.SimpleQueue[Any]] = []
        self._end = weakref.finalize(self, end_children, self._children, self._directory)
        self.model_fds = {
            place.node: os.memfd_create("batchwright-weights") for place in reversed(places)
        }
        try:
            for number, place in enumerate(places):
                self._start(number, place)
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, place: Place) -> None:
        model_fd = self.model_fds[place.node]
        arguments = [str(model_fd), ",".join(map(str, place.cores))]
        child = start_child(number, self._directory, PROGRAM, arguments, [model_fd])
        self._children.append(child)
        outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outboxes.append(outbox)
        threading.Thread(target=_listen, args=(child, self.inbox), daemon=True).start()
        threading.Thread(target=_tell, args=(child, outbox), daemon=True).start()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def pids(self) -> list[int]:
        """Their processes."""
        return [child.process.pid for child in self._children]

    def send(self, number: int, message: Any) -> None:
        """Tell one something; what one that is gone is told is lost."""
        self._outboxes[number].put(message)

    def wait_ready(self) -> None:
        """Until all are done with what takes long.

        Raises:
            BatchwrightError: one has failed; what it raised, if that is for a user.
        """
        num_ready = 0
        while num_ready < len(self):
            self.inbox.wait()
            number, message = self.inbox.messages.popleft()
            if isinstance(message, Failed):
                raise message.error or ReplicaError(f"replica {number} {message.text}")
            num_ready += isinstance(message, Ready)

    def forget_model(self) -> None:
        """The model's numbers stay as long as replicas map them, and no longer."""
        for file_descriptor in self.model_fds.values():
            os.close(file_descriptor)
        self.model_fds = {}

    def close(self) -> None:
        """End them at once."""
        self.forget_model()
        for outbox in self._outboxes:
            outbox.put(None)
        self._end()


def _listen(child: ChildProcess, inbox: Inbox) -> None:
    """Until the child ends."""
    last = None
    with suppress(EOFError, OSError):
        while True:
            message = pickle.loads(child.connection.recv_bytes())
            if isinstance(message, Failed):
                last = message
                break
            inbox.put(child.number, message)
    if last is None:
        last = Failed(None, child.how_it_ended())
    else:
        last = last._replace(text=f"failed: {last.text}")
    inbox.put(child.number, last)


def _tell(child: ChildProcess, outbox: queue.SimpleQueue[Any]) -> None:
    """Until the child is gone or None is to be told."""
    while (message := outbox.get()) is not None:
        try:
            child.connection.send_bytes(pickle.dumps(message))
        except OSError:
            return
