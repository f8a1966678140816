"""Prompts as the arrays that planning works on."""

import numpy as np

from batchwright.plan.job_tree import JobTree, build_job_tree


def arrays(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, offsets) of these prompts."""
    tokens = np.array([token for prompt in prompts for token in prompt], np.int32)
    offsets = np.concatenate(([0], np.cumsum([len(p) for p in prompts]))).astype(np.int64)
    return tokens, offsets


def tree_of(prompts: list[list[int]]) -> JobTree:
    return build_job_tree(*arrays(prompts))
