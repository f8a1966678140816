"""Prompts as the arrays that planning works on."""

import numpy as np

from batchwright.plan.job_tree import JobTree, build_job_tree
from batchwright.plan.order import EQUAL_RATES, JobFacts, Rates


def arrays(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, offsets) of these prompts."""
    tokens = np.array([token for prompt in prompts for token in prompt], np.int32)
    offsets = np.concatenate(([0], np.cumsum([len(p) for p in prompts]))).astype(np.int64)
    return tokens, offsets


def tree_of(prompts: list[list[int]]) -> JobTree:
    return build_job_tree(*arrays(prompts))


def job_of(
    prompts: list[list[int]],
    outputs: list[float] | float = 1.0,
    *,
    block_size: int = 1,
    continues: int | None = None,
    rates: Rates = EQUAL_RATES,
) -> JobFacts:
    """Facts of a job of these prompts and expected outputs (one for all, or one each)."""
    return JobFacts(
        num_prompt_tokens=np.array([len(prompt) for prompt in prompts], np.int64),
        num_output_tokens=np.broadcast_to(np.asarray(outputs, np.float64), len(prompts)),
        make_tree=lambda: tree_of(prompts).in_blocks(block_size),
        continues=continues,
        rates=rates,
    )


def branching(root: int, children: list[tuple[int, int]]) -> list[list[int]]:
    """Prompts below a root of `root` tokens, whose children are (tokens, leaves of one token)."""
    return [
        [0] * root + [child + 1] * tokens + [leaf + 1000]
        for child, (tokens, leaves) in enumerate(children)
        for leaf in range(leaves)
    ]


def num_computed(prompts: list[list[int]], rows: list[int]) -> int:
    """Prompt tokens computed in this order when only the row before is still resident."""
    total, before = 0, []
    for row in rows:
        prompt = prompts[row]
        pairs = enumerate(zip(before, prompt))
        total += len(prompt) - next(
            (i for i, (a, b) in pairs if a != b), min(len(before), len(prompt))
        )
        before = prompt
    return total
