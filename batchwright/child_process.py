"""Processes of our own beside this one, each with a socket to it.

The socket's end tells at once, in both directions, that the other process is gone, however it
ended. A child gets our search path; unlike with multiprocessing the main module is not run again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path


@dataclass(frozen=True)
class ChildProcess:
    """A process that was started here.

    Attributes:
        number: what it is called among its like.
        connection: to it.
        stderr: the file that has what it wrote there.
    """

    number: int
    process: subprocess.Popen[bytes]
    connection: Connection
    stderr: Path

    def how_it_ended(self) -> str:
        """In words, after it has ended or is about to."""
        status = self.process.wait()
        if status < 0:
            return (
                f"was ended by signal {-status} (without memory left, the system does that with 9)"
            )
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = self.stderr.read_text(errors="replace").strip().splitlines()
        return f"ended with status {status}" + (f" ({lines[-1][:200]})" if lines else "")


def start_child(
    number: int,
    directory: Path,
    program: str,
    arguments: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
) -> ChildProcess:
    """Start one.

    Args:
        directory: for what it writes to stderr.
        program: Python, which finds in sys.argv the file descriptor of its socket, `arguments` and
            then our search path.
        pass_fds: file descriptors that it gets besides.
    Raises:
        OSError: the system has no room for it.
    """
    ours, theirs = socket.socketpair()
    stderr = directory / f"stderr-{number}"
    with theirs, stderr.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(theirs.fileno()), *arguments, *sys.path],
            pass_fds=(theirs.fileno(), *pass_fds),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,  # Ctrl-C is for this process; its end closes the socket
            env=os.environ.copy(),
        )
    return ChildProcess(number, process, Connection(ours.detach()), stderr)


def end_children(children: Sequence[ChildProcess], directory: Path) -> None:
    """End them at once, for they have nothing to lose, and remove their directory."""
    for child in children:
        child.process.kill()
    for child in children:
        child.process.wait()
        with contextlib.suppress(OSError):
            child.connection.close()
    shutil.rmtree(directory, ignore_errors=True)
