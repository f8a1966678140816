"""What memory a GPU has for keys and values, found by computing the largest step."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

RESERVE_SHARE = 0.03
"""Of all memory, kept for captured graphs, libraries and what the allocator cannot use."""


def has_gpu() -> bool:
    """Whether torch can use an NVIDIA card."""
    return torch.cuda.is_available()


def num_gpus() -> int:
    """Cards that torch can use."""
    return torch.cuda.device_count() if has_gpu() else 0


def free_bytes() -> int:
    """Bytes that nobody has taken on the current card; what torch holds unused counts as free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return int(free)


class StepMemory:
    """Measures what a step takes beside weights, keys and values.

    Used around the largest step: `with StepMemory() as memory: ...`.

    Attributes:
        left_bytes: what keys and values may take, so that the step can be computed beside them.
    """

    left_bytes = 0

    def __enter__(self) -> StepMemory:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *failure: object) -> None:
        torch.cuda.synchronize()
        step = torch.cuda.max_memory_allocated() - self._before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        self.left_bytes = max(int(free - 1.1 * step - RESERVE_SHARE * total), 0)
        logger.info(
            "GPU memory: %.1f of %.1f GB free beside the weights, the largest step takes %.2f GB",
            free / 1e9,
            total / 1e9,
            step / 1e9,
        )
