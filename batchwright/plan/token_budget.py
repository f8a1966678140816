"""Which token budget of a step is best, by the cost model.

In the long run a step of a job has decodes and prompt tokens in the ratio of its output to its
prompts: rows that end make room for prompts to be computed. So for each budget one such hybrid step
is charged, and what counts is tokens per second. Sarathi-Serve (arXiv:2403.02310) takes the largest
budget that meets a limit on latency; offline there is none, and the budget grows as long as that
buys throughput.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from batchwright.plan.cost import CostModel, ModelShape
from batchwright.step import Step, TableUpdate

BUDGETS = (256, 512, 1024, 2048, 4096)

LEAST_GAIN = 0.01
"""Less than this share of throughput is no reason to take a larger budget."""


class BudgetChoice(NamedTuple):
    """A token budget, and what each that fits was predicted to reach.

    Attributes:
        tokens_per_s: by budget; prompt and output tokens that are computed.
    """

    budget: int
    tokens_per_s: dict[int, float]


def choose_token_budget(
    cost: CostModel,
    *,
    num_prompt: float,
    num_output: float,
    max_num_seqs: int,
    budgets: Sequence[int] = BUDGETS,
    activation_bytes: float = float("inf"),
) -> BudgetChoice:
    """The smallest budget that is within LEAST_GAIN of the best.

    Args:
        num_prompt, num_output: computed tokens of a row, on average.
        max_num_seqs: rows that run at once.
        budgets: ascending; those below max_num_seqs cannot run and are left out.
        activation_bytes: memory for the activations of a step; larger budgets are left out.
    """
    most = activation_bytes / activation_bytes_per_token(cost.shape, cost.weight_bytes)
    fitting = [budget for budget in budgets if max_num_seqs <= budget <= most]
    if not fitting:
        return BudgetChoice(max(max_num_seqs, budgets[0]), {})
    tokens_per_s = {}
    for budget in fitting:
        step = steady_step(budget, num_prompt, num_output, max_num_seqs)
        tokens_per_s[budget] = step.num_tokens / cost.seconds(step)
    enough = (1 - LEAST_GAIN) * max(tokens_per_s.values())
    budget = next(budget for budget in fitting if tokens_per_s[budget] >= enough)
    return BudgetChoice(budget, tokens_per_s)


def activation_bytes_per_token(shape: ModelShape, itemsize: int) -> int:
    """What a token's activations take at once: in and out of the widest product, and residuals."""
    widest = max(product.in_features + product.out_features for product in shape.products)
    return itemsize * (widest + 2 * shape.hidden_size)


def steady_step(budget: int, num_prompt: float, num_output: float, max_num_seqs: int) -> Step:
    """A step of a long job in its middle.

    If prompts are many, they fill the budget and hold back the decodes; if not, all slots decode
    and the step is smaller than its budget.
    """
    per_decode = num_prompt / max(num_output, 1.0)
    num_decodes = min(max_num_seqs, int(budget / (1 + per_decode)))
    is_full = num_decodes == max_num_seqs
    num_prefill = round(num_decodes * per_decode) if is_full else budget - num_decodes
    context = round(num_prompt + num_output / 2)
    rows = [(context, context + 1)] * num_decodes
    length = max(round(num_prompt), 1)
    while num_prefill > 0:
        chunk = min(num_prefill, length)
        rows.append((0, chunk))
        num_prefill -= chunk
    return _step(rows, num_decodes)


def _step(rows: Sequence[tuple[int, int]], num_draws: int) -> Step:
    """Row i computes positions [start, end); the first rows draw a token."""
    empty = np.empty(0, np.int32)
    positions = np.concatenate([empty, *(np.arange(*row, dtype=np.int32) for row in rows)])
    lengths = [end - start for start, end in rows]
    draws = np.arange(num_draws, dtype=np.int32)
    return Step(
        step_id=0,
        finished_slots=empty,
        new_sequences=(),
        table_updates=(TableUpdate(empty, empty, empty),),
        block_copies=(np.empty((0, 2), np.int32),),
        slots=np.arange(len(rows), dtype=np.int32),
        cu_seqlens_q=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        token_ids=np.zeros_like(positions),
        positions=positions,
        kv_slots=(positions,),
        sample_tokens=draws,
        sample_slots=draws,
        score_tokens=empty,
        score_targets=empty,
    )
