"""The other side of `replicas.py`: an engine that runs what its parent gives it."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from batchwright import kernels
from batchwright.data_parallel.messages import (
    Abandon,
    Add,
    Cancel,
    Failed,
    Load,
    Logged,
    NoteEarlier,
    Ready,
    Report,
)
from batchwright.data_parallel.shared_model import map_model
from batchwright.engine import Engine
from batchwright.engine_around import engine_around
from batchwright.errors import BatchwrightError, RequestError
from batchwright.exec.build import build_executor, use_threads
from batchwright.job.engine_counts import EngineCounts
from batchwright.models.loader import read_config
from batchwright.models.shape import shape_of
from batchwright.outputs import failed
from batchwright.recovery import describe
from batchwright.request import Result
from batchwright.text.tokenizer import load_tokenizer
from batchwright.weights.checkpoint import open_checkpoint


def main(socket_fd: int, model_fd: int) -> None:
    """Serve the parent over a socket."""
    parent = _Parent(Connection(socket_fd))
    logging.getLogger("batchwright").addHandler(_ToParent(parent))
    engine: Engine | None = None
    try:
        parent.send(Ready())  # what takes long to import is there
        order = parent.inbox.get()
        assert isinstance(order, Load)
        engine = _load(order, model_fd)
        parent.send(Ready())
        _Replica(engine, parent).run()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent tells it
        if isinstance(error, BatchwrightError):
            parent.send(Failed(error, str(error)))
        else:
            parent.send(Failed(None, describe(error)))
        if engine is not None:
            engine.close()  # which may have a process of its own
        os._exit(1)


class _Parent:
    """The process that started this one. Without it, this one ends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True).start()

    def send(self, message: Any) -> None:
        with self._sending:
            self._connection.send_bytes(pickle.dumps(message))

    def _receive(self) -> None:
        while True:
            try:
                self.inbox.put(pickle.loads(self._connection.recv_bytes()))
            except (EOFError, OSError):
                os._exit(0)


class _ToParent(logging.Handler):
    """Passes on what a user should know. What every replica does is not worth N lines."""

    def __init__(self, parent: _Parent) -> None:
        super().__init__(logging.WARNING)
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        self._parent.send(Logged(record.levelno, record.getMessage()))


class _Replica:
    """The loop: take what has come, run a step, report."""

    def __init__(self, engine: Engine, parent: _Parent) -> None:
        self._engine, self._parent = engine, parent
        self._epoch = self._num_taken = 0
        self._refused: list[Result] = []

    def run(self) -> None:
        while True:
            self._take(self._parent.inbox.get())
            while True:
                self._take_all()
                if not (self._engine.num_unfinished or self._refused):
                    break
                results = self._engine.step() if self._engine.num_unfinished else []
                self._report(results)

    def _take_all(self) -> None:
        while True:
            try:
                self._take(self._parent.inbox.get_nowait())
            except queue.Empty:
                return

    def _take(self, message: Any) -> None:
        engine = self._engine
        if isinstance(message, Add):
            for request in message.requests:
                self._num_taken += 1
                try:
                    engine.add(request)
                except RequestError as error:
                    self._refused.append(failed(request, error))
        elif isinstance(message, Cancel):
            if any(result.request_id == message.request_id for result in self._refused):
                return
            if message.request_id in engine:  # or its result is on its way
                engine.cancel(message.request_id)
        elif isinstance(message, NoteEarlier):
            engine.note_earlier(*message)
        elif isinstance(message, Abandon):
            engine.abandon()
            self._refused.clear()
            self._epoch, self._num_taken = message.epoch, 0

    def _report(self, results: list[Result]) -> None:
        engine, load = self._engine, self._engine.load
        self._parent.send(
            Report(
                epoch=self._epoch,
                num_taken=self._num_taken,
                results=(*self._refused, *results),
                counts=EngineCounts.of(engine.stats),
                waiting_ids=tuple(engine.waiting_ids()),
                num_running_seqs=load.num_running_seqs,
                num_waiting_seqs=load.num_waiting_seqs,
                kv_used_fraction=load.kv_used_fraction,
                compile_s=kernels.compile_seconds(),
                own_bytes=_own_bytes(),
            )
        )
        self._refused.clear()


def _load(order: Load, model_fd: int) -> Engine:
    config = order.config
    use_threads(config.num_threads)
    model = map_model(order.model, model_fd)
    os.close(model_fd)
    checkpoint = open_checkpoint(order.path)
    vocab_size = read_config(checkpoint.config)["vocab_size"]
    executor, groups, config = build_executor(model, config, vocab_size=vocab_size)
    tokenizer = load_tokenizer(order.path)
    return engine_around(executor, groups, config, shape_of(model), checkpoint, tokenizer)


def _own_bytes() -> int:
    """Memory that is no file's and not shared, as the system counts it; 0 where it does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon")]
    return int(found[0]) * 1024 if found else 0
