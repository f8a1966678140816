"""start_replicas: a model loaded once, and replicas of an engine that map its weights."""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress
from dataclasses import replace

import torch

from batchwright.config import AUTO_ORDER, ResolvedConfig
from batchwright.data_parallel.cores import Place, places_for
from batchwright.data_parallel.engine import ReplicatedEngine
from batchwright.data_parallel.messages import Load
from batchwright.data_parallel.replicas import Replicas
from batchwright.data_parallel.row_queue import RowQueue
from batchwright.data_parallel.shared_model import write_model
from batchwright.engine_around import order_here
from batchwright.errors import ReplicaError
from batchwright.exec.build import use_threads
from batchwright.limits import ModelLimits
from batchwright.models.loader import load_model
from batchwright.models.shape import read_shape
from batchwright.opened_model import kv_groups
from batchwright.plan.orders.longest_first import longest_first
from batchwright.plan.orders.prefix_dfs import prefix_dfs
from batchwright.structured.compile import GrammarCompiler
from batchwright.text.tokenizer import Tokenizer
from batchwright.weights.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


def start_replicas(
    checkpoint: Checkpoint, tokenizer: Tokenizer, config: ResolvedConfig
) -> ReplicatedEngine:
    """Start `config.data_parallel_size` replicas, load the model while they start, and share it.

    Raises:
        BatchwrightError: the model cannot be loaded or a replica not be started.
    """
    shape = read_shape(checkpoint.config)
    groups, vocab_size = kv_groups(config, shape), shape.vocab_size
    places = places_for(config.data_parallel_size)
    try:
        replicas = Replicas(places)
    except OSError as error:
        raise ReplicaError(
            f"{len(places)} replicas (data_parallel_size) cannot be started: {error.strerror}; "
            "start fewer"
        ) from error
    try:
        _load(checkpoint, config, replicas)
    except BaseException:
        replicas.close()
        raise
    logger.info(
        "%d replicas, %d %s each; memory for keys and values of each: up to %s, taken as needed",
        len(replicas),
        config.num_threads,
        "thread" if config.num_threads == 1 else "threads",
        " and ".join(f"{group.num_blocks * config.block_size:,} tokens" for group in groups),
    )
    is_longest_first = config.order == longest_first.__name__
    return ReplicatedEngine(
        replicas,
        RowQueue(
            len(replicas),
            block_size=config.block_size,
            order=longest_first if is_longest_first else prefix_dfs,
            in_turns=is_longest_first,
        ),
        ModelLimits(config.max_model_len, vocab_size),
        max_num_batched_tokens=config.max_num_batched_tokens,
        grammars=GrammarCompiler(tokenizer, vocab_size),
        shape=shape,
        order=order_here(checkpoint, config, groups, shape),
    )


def _load(checkpoint: Checkpoint, config: ResolvedConfig, replicas: Replicas) -> None:
    """Load the model here, with all cores, write it where replicas map it, and forget it."""
    use_threads(sum(len(place.cores) for place in replicas.places))
    model = load_model(
        checkpoint,
        dtype=getattr(torch, config.dtype),
        max_positions=config.max_model_len,
        quantize=config.quantize,
    )
    num_nodes = len(replicas.model_fds)
    for node, file_descriptor in replicas.model_fds.items():
        cores = [core for place in replicas.places if place.node == node for core in place.cores]
        rest = write_model(model, file_descriptor, cores if num_nodes > 1 else ())
    del model
    _return_free_memory()
    replicas.wait_ready()  # they have imported all they need
    for number, place in enumerate(replicas.places):
        own = _config_of(config, place)
        replicas.send(number, Load(checkpoint.path, own, rest))
    replicas.wait_ready()
    replicas.forget_model()


def _return_free_memory() -> None:
    """To the system: of what is freed in pieces below 32 MB, glibc would keep it all."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _config_of(config: ResolvedConfig, place: Place) -> ResolvedConfig:
    """A replica's own settings. Its rows come in an order already, so it measures nothing."""
    return replace(
        config,
        num_threads=min(config.num_threads, len(place.cores)),
        data_parallel_size=1,
        order=prefix_dfs.__name__ if config.order == AUTO_ORDER else config.order,
    )
