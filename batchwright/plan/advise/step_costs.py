"""What typical Steps cost: the numbers that queues and replicas are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchwright.plan.advise.batch_queue import BatchService
from batchwright.plan.advise.replicas import StepMix
from batchwright.plan.cost import CostModel
from batchwright.plan.shape import ModelShape
from batchwright.step import Step, TableUpdate


def decode_step(num_rows: int, context: int, num_groups: int) -> Step:
    """A Step in which so many rows compute one token each, `context` tokens being before it."""
    return _step([(context, context + 1)] * num_rows, num_groups)


def decode_mix(cost: CostModel, num_rows: int, context: int) -> StepMix:
    """What a decode step needs of the device.

    Memory traffic is at the rate at which this device reads keys and values; arithmetic at that of
    its best products.
    """
    step = decode_step(num_rows, context, len(cost.shape.attention))
    hardware, shape = cost.hardware, cost.shape
    total_s = cost.seconds(step)
    busy_s = max(total_s - hardware.step_s, 0.0)
    layers_s = num_rows * shape.layer_flops_per_token / hardware.layers.best
    head_s = num_rows * shape.head_flops_per_token / hardware.head.best
    num_keys = num_rows * context
    attention_s = num_keys * shape.attention_flops_per_key / hardware.attention_flops_per_s
    memory_s = cost.num_bytes(step) / max(hardware.kv_bytes_per_s, hardware.memory_bytes_per_s)
    compute_s = min(layers_s + head_s + attention_s + num_rows * hardware.token_s, busy_s)
    return StepMix(total_s - busy_s, busy_s, compute_s, min(memory_s, busy_s))


def prompt_s(cost: CostModel, num_tokens: int, budget: int) -> float:
    """Seconds of computing a prompt alone, in Steps of at most `budget` tokens."""
    starts = range(0, num_tokens, budget)
    chunks = [(start, min(start + budget, num_tokens)) for start in starts]
    return sum(cost.seconds(_step([chunk], len(cost.shape.attention))) for chunk in chunks)


def batch_service(
    cost: CostModel, *, num_prompt: int, context: int, num_rows: int, budget: int
) -> BatchService:
    """k1 to k4 of `BatchService`.

    Args:
        num_prompt: tokens of a prompt that are computed.
        context: mean tokens before the one that is decoded.
        num_rows: decode steps are taken as linear between one row and so many.
        budget: most tokens of a Step.
    """
    num_groups = len(cost.shape.attention)
    one_s = cost.seconds(decode_step(1, context, num_groups))
    many_s = cost.seconds(decode_step(num_rows, context, num_groups))
    row_s = max(many_s - one_s, 0.0) / (num_rows - 1) if num_rows > 1 else 0.0
    fixed_s = cost.hardware.step_s
    return BatchService(
        prompt_s=max(prompt_s(cost, num_prompt, budget) - fixed_s, 0.0),
        prefill_s=fixed_s,
        row_token_s=row_s,
        step_s=one_s - row_s,
    )


def activation_bytes(
    shape: ModelShape, num_tokens: int, num_rows: int, element_bytes: float
) -> int:
    """Memory of a Step besides weights and KV: the widest product's ends, hidden states, logits."""
    widest = max(product.in_features + product.out_features for product in shape.products)
    hidden = num_tokens * (widest + 4 * shape.hidden_size) * element_bytes
    return int(hidden + 4 * num_rows * shape.vocab_size)  # logits are fp32


def _step(rows: Sequence[tuple[int, int]], num_groups: int) -> Step:
    """A Step whose rows compute positions [start, end) and draw from the last."""
    lengths = np.array([end - start for start, end in rows])
    positions = np.concatenate([np.arange(*row, dtype=np.int32) for row in rows])
    ends = np.cumsum(lengths).astype(np.int32)
    empty = np.empty(0, np.int32)
    slots = np.arange(len(rows), dtype=np.int32)
    return Step(
        step_id=0,
        finished_slots=empty,
        new_sequences=(),
        table_updates=(TableUpdate(empty, empty, empty),) * num_groups,
        block_copies=(np.empty((0, 2), np.int32),) * num_groups,
        slots=slots,
        cu_seqlens_q=np.concatenate((np.zeros(1, np.int32), ends)),
        token_ids=np.zeros_like(positions),
        positions=positions,
        kv_slots=(positions,) * num_groups,
        sample_tokens=ends - 1,
        sample_slots=slots,
        score_tokens=empty,
        score_targets=empty,
    )
