"""DeviceSampler: draws where the logits are, as far as kernels for it are there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from batchwright.request import Int32Array
from batchwright.sampling.state import SamplingState
from batchwright.step import NewSequence, Step, TokenLogprobs


class Drawn(NamedTuple):
    """Tokens of a step.

    Attributes:
        token_ids: [num_samples] int32 on the device; -1: none can be drawn.
        logprobs: if any slot asked for them.
    """

    token_ids: torch.Tensor
    logprobs: TokenLogprobs | None


class DeviceSampler:
    """Per-slot sampling state, and the draw of a step.

    Args: as SamplingState.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, vocab_size: int) -> None:
        self._state = SamplingState(max_num_seqs, max_model_len, vocab_size)

    def add(self, new: NewSequence) -> None:
        """See SamplingState.add."""
        self._state.add(new)

    def draw(self, logits: torch.Tensor, step: Step, output_positions: Int32Array) -> Drawn:
        """One token per sample of the step.

        Args:
            logits: [num_samples, vocab_size] on the device.
            output_positions: [num_samples] output tokens the slot had before this draw.

        Greedy draws stay on the device. All others are made by the CPU's sampler, which waits for
        the logits.
        """
        slots = step.sample_slots
        if step.masks is None and self._state.are_plain(slots):
            return Drawn(greedy(logits), None)
        token_ids, logprobs = self._state.sample(
            logits.float().cpu().contiguous().numpy(),
            np.arange(len(slots), dtype=np.int32),
            slots,
            output_positions,
            step.masks,
            step.mask_of_sample,
        )
        self._state.append(slots, token_ids)
        return Drawn(torch.from_numpy(token_ids).to(logits.device), logprobs)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """[num_rows] int32: the token of the largest logit; -1 for a row with a NaN or +inf."""
    best, token_ids = logits.max(dim=1)
    return torch.where(best.isfinite(), token_ids, -1).int()
