"""Worker: one process that can be killed, for work on text that rows bring.

A schema, a regular expression, a grammar or a chat template may take any time and any memory, and
a thread cannot be stopped. So they are tried in a process with a memory limit, which is killed
when a task is late; the next task starts another one.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from batchwright.errors import BatchwrightError, RequestError
from batchwright.structured.spec import GrammarSpec
from batchwright.structured.vocabulary import Vocabulary

DEADLINE_S = 2.0
MEMORY_BYTES = 1 << 30
START_S = 60.0  # a machine under load is slow to start a process; nothing of a row runs in it

# As multiprocessing's spawn does, the process gets our search path; unlike there, the main module
# is not run again, so scripts need no `if __name__ == "__main__"`.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from batchwright.structured.worker_process import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]))"
)
_Answer = tuple[str, str, str | None]


class Late(Exception):
    """A task did not end within its deadline; the process was killed."""


class Died(Exception):
    """The process ended during a task, most likely at its memory limit."""


class Worker:
    """Compiles grammars and renders chat templates in a process of its own.

    Started by the first task; safe to use from several threads, which take turns.

    Args:
        deadline_s: time of one task.
        memory_bytes: what tasks may take beyond the process's own memory.
    """

    def __init__(self, deadline_s: float = DEADLINE_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self.deadline_s = deadline_s
        self.memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._end: weakref.finalize[Any, Worker] | None = None
        self._vocabulary: Vocabulary | None = None  # the one the process has

    def compile(self, vocabulary: Vocabulary, spec: GrammarSpec) -> str:
        """The llguidance form of a grammar, which is known to compile.

        Raises:
            RequestError: it does not compile, or not within the limits; `message` is the reason.
        """
        with self._lock:
            self._start()
            if self._vocabulary is not vocabulary:
                self._ask(START_S, "vocabulary", *astuple(vocabulary))
                self._vocabulary = vocabulary
            return self._try("compile", str(spec.kind), spec.text)

    def render(self, source: str, options: dict[str, Any]) -> str:
        """Render a chat template that a row brings; options are those of ChatTemplate.render.

        Raises:
            RequestError: the template or the row is at fault, or it exceeds the limits.
        """
        with self._lock:
            self._start()
            return self._try("render", source, {**options, "now": options["now"].isoformat()})

    def close(self) -> None:
        """End the process; a later task starts another one."""
        with self._lock:
            self._stop()

    def _try(self, name: str, *arguments: Any) -> str:
        try:
            kind, text, param = self._ask(self.deadline_s, name, *arguments)
        except Late:
            raise RequestError(f"it takes more than {self.deadline_s:g} s; simplify it") from None
        except Died:
            limit = f"{self.memory_bytes / 2**20:,.0f} MiB"
            raise RequestError(f"it takes more than {limit} of memory; simplify it") from None
        if kind == "error":
            raise RequestError(text, param=param)
        return text

    def _ask(self, seconds: float, name: str, *arguments: Any) -> _Answer:
        connection = self._connection
        assert connection is not None
        try:
            task = msgspec.msgpack.encode((seconds, name, arguments))
        except (TypeError, OverflowError, UnicodeError, RecursionError) as error:
            raise RequestError(f"it has a value that cannot be used: {error}") from None
        try:
            connection.send_bytes(task)
            if not connection.poll(seconds):
                raise Late
            return msgspec.msgpack.decode(connection.recv_bytes(), type=_Answer)
        except (OSError, EOFError) as error:
            self._stop()
            raise Died from error
        except BaseException:  # late, or interrupted: its answer would be taken for the next one's
            self._stop()
            raise

    def _start(self) -> None:
        if self._connection is not None:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _PROGRAM),
                    *(str(theirs.fileno()), str(self.memory_bytes), *sys.path),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent, which then closes the socket
                env=os.environ | dict.fromkeys(_THREAD_COUNTS, "1"),
            )
        self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, process, self._connection)
        try:
            if self._connection.poll(START_S) and self._connection.recv_bytes() == b"ready":
                return
        except (OSError, EOFError):
            pass
        self._stop()
        raise BatchwrightError(
            "the process that compiles grammars and row templates could not be started "
            f"(exit code {process.returncode}); check that {sys.executable} runs and imports "
            "batchwright"
        )

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._connection = self._vocabulary = self._end = None


@dataclass(frozen=True, slots=True)
class RowTemplate:
    """A chat template that a row brings, with the face of `text.chat_template.ChatTemplate`."""

    source: str
    worker: Worker

    def render(self, **options: Any) -> str:
        """Render in the worker process; see ChatTemplate.render.

        Raises:
            RequestError: the template or the row is at fault, or it exceeds the worker's limits.
        """
        try:
            return self.worker.render(self.source, options)
        except RequestError as error:
            raise RequestError(
                f"chat_template: {error.message}", param=error.param or "chat_template"
            ) from None


# Each thread of a pool maps memory of its own, which would count against the limit.
_THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.send_signal(signal.SIGKILL)
    process.wait()
