"""What the parent and a replica tell each other: pickled, between two processes of one program."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from batchwright.config import ResolvedConfig
from batchwright.job.engine_counts import EngineCounts
from batchwright.request import Request, Result


class Load(NamedTuple):
    """To a replica: make an engine.

    Attributes:
        path: the model's.
        config: the replica's own part of threads and memory.
        model: what `shared_model.write_model` returned; the numbers are in the file whose
            descriptor the replica was started with.
    """

    path: Path
    config: ResolvedConfig
    model: bytes


class Add(NamedTuple):
    """To a replica: run these."""

    requests: list[Request]


class Cancel(NamedTuple):
    """To a replica: end this one now, if it has not ended."""

    request_id: str


class NoteEarlier(NamedTuple):
    """To a replica: see `Engine.note_earlier`."""

    request: Request
    num_output: int


class Abandon(NamedTuple):
    """To a replica: end everything; what it reports from now on is of a new epoch."""

    epoch: int


class Ready(NamedTuple):
    """From a replica: it has done what takes long."""


class Report(NamedTuple):
    """From a replica: what a step has changed, and how it stands.

    Attributes:
        epoch: of the requests; see Abandon.
        num_taken: requests of this epoch that it has taken in.
        results: of those that have ended.
        counts: of its engine since it was made.
        waiting_ids: requests that have not started.
        num_running_seqs, num_waiting_seqs, kv_used_fraction: as `Engine.load` has them.
        compile_s: seconds it has spent compiling kernels.
        own_bytes: memory of its own, which no other process shares.
    """

    epoch: int = 0
    num_taken: int = 0
    results: tuple[Result, ...] = ()
    counts: EngineCounts = EngineCounts()
    waiting_ids: tuple[str, ...] = ()
    num_running_seqs: int = 0
    num_waiting_seqs: int = 0
    kv_used_fraction: float = 0.0
    compile_s: float = 0.0
    own_bytes: int = 0


class Logged(NamedTuple):
    """From a replica: a warning for the log."""

    level: int
    text: str


class Failed(NamedTuple):
    """From a replica, the last thing it says.

    Attributes:
        error: what its parent shall raise, if it was not ready yet.
        text: why.
    """

    error: Exception | None
    text: str
