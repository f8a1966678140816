"""The other side of `followers.py`: a rank that computes what rank 0 says, until that is gone."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from batchwright.config import ResolvedConfig
from batchwright.exec.build import build_executor, use_threads
from batchwright.exec.executor import Executor
from batchwright.exec.memory import is_out_of_memory
from batchwright.models.loader import load_model, read_config
from batchwright.recovery import describe
from batchwright.tensor_parallel.followers import ORDER, READY, STEP
from batchwright.tensor_parallel.ranks import LostRanksError, Ranks, join
from batchwright.tensor_parallel.step_message import decode_step
from batchwright.weights.checkpoint import open_checkpoint


def main(file_descriptor: int) -> None:
    """Serve rank 0 over a socket."""
    connection = Connection(file_descriptor)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    try:
        connection.send_bytes(READY)  # what takes long to import is there
        _follow(connection, inbox)
    except BaseException as error:  # noqa: BLE001 - whatever it is, rank 0 tells it
        connection.send_bytes(describe(error).encode())
        os._exit(1)  # no clean-up that could wait for other ranks


def _receive(connection: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    """Take messages as they come. Without rank 0 the process ends, even within a collective."""
    while True:
        try:
            inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def _follow(connection: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    ranks: Ranks | None = None
    executor: Executor | None = None
    build: Callable[[], Executor] | None = None
    on_gpu = has_left = False
    while True:
        message = inbox.get()
        kind, rest = message[: len(ORDER)], message[len(ORDER) :]
        if kind != ORDER:
            assert executor is not None and ranks is not None
            if has_left:  # sent before rank 0 knew
                continue
            try:
                executor.execute(decode_step(rest))
            except Exception as error:
                if on_gpu:
                    raise
                has_left = True
                ranks.leave()
                connection.send_bytes(STEP + _report(error))
            continue
        order = json.loads(b"{" + rest)
        if "join" in order:
            (store, rank, size), on_gpu = order["join"], order["on_gpu"]
            ranks = join(Path(store), rank, size, on_gpu=on_gpu)
        elif "rejoin" in order:
            assert ranks is not None
            ranks.leave()
            connection.send_bytes(READY)
            ranks.rejoin(Path(order["rejoin"]))
            has_left = False
        elif "model" in order:
            assert ranks is not None
            executor, build = None, _load(order, ranks)
            connection.send_bytes(READY)
        else:
            assert build is not None
            executor, build = build(), None


def _report(error: Exception) -> bytes:
    """Why a step failed here."""
    what = {
        "is_cause": not isinstance(error, LostRanksError),
        "is_memory": is_out_of_memory(error),
        "text": describe(error),
    }
    return json.dumps(what).encode()


def _load(order: dict[str, Any], ranks: Ranks) -> Callable[[], Executor]:
    """The model's weights; returns what makes an executor of them."""
    config = ResolvedConfig(**order["config"])
    checkpoint = open_checkpoint(Path(order["model"]))
    use_threads(config.num_threads)
    model = load_model(
        checkpoint,
        dtype=getattr(torch, config.dtype),
        max_positions=config.max_model_len,
        device=config.device,
        quantize=config.quantize,
        ranks=ranks,
    )
    vocab_size = read_config(checkpoint.config)["vocab_size"]
    return lambda: build_executor(model, config, vocab_size=vocab_size, ranks=ranks)[0]
