"""engine_around: an engine for an executor, with the settings that were settled."""

from __future__ import annotations

from collections.abc import Sequence

from batchwright.config import ResolvedConfig
from batchwright.engine import Engine
from batchwright.exec.executor import Executor
from batchwright.exec.machine_cost import machine_cost
from batchwright.kv.groups import KVGroup
from batchwright.models.loader import read_config
from batchwright.order_trial import chosen_order
from batchwright.plan.length_predictor import find_predictor
from batchwright.plan.order import OrderFunction
from batchwright.plan.shape import ModelShape
from batchwright.sched.scheduler import Scheduler
from batchwright.structured.compile import GrammarCompiler
from batchwright.text.tokenizer import Tokenizer
from batchwright.weights.checkpoint import Checkpoint
from batchwright.weights.forms import stored_forms


def engine_around(
    executor: Executor,
    groups: Sequence[KVGroup],
    config: ResolvedConfig,
    shape: ModelShape,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
) -> Engine:
    """An engine.

    Args:
        groups: of the keys and values that the executor has memory for.
        shape: of the whole model, of which the executor may have a part.
    """
    vocab_size = read_config(checkpoint.config)["vocab_size"]
    scheduler = Scheduler(
        groups,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        prefix_sharing=config.prefix_sharing,
        order=order_here(checkpoint, config, groups, shape),
        lengths=find_predictor(config.length_predictor),
    )
    return Engine(
        scheduler,
        executor,
        tokenizer,
        max_model_len=config.max_model_len,
        vocab_size=vocab_size,
        job_seed=config.seed,
        look_ahead=config.look_ahead,
        grammars=GrammarCompiler(tokenizer, vocab_size),
        shape=shape,
    )


def order_here(
    checkpoint: Checkpoint, config: ResolvedConfig, groups: Sequence[KVGroup], shape: ModelShape
) -> OrderFunction:
    """The order of `config`; `auto` measures this machine, if that pays."""
    return chosen_order(
        config,
        groups,
        shape,
        lambda: machine_cost(checkpoint.config, shape, config, stored_forms(checkpoint)),
    )
