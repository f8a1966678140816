"""Pooler: hidden states of a prompt, chunk by chunk, into one embedding."""

from __future__ import annotations

import torch

from batchwright.step import Step


class Pooler:
    """Mean or last hidden state per slot.

    The mean is summed in float64, one token after the other, so that it does not depend on how
    the prompt was cut into chunks.
    """

    def __init__(self) -> None:
        self._pooling: dict[int, str] = {}
        self._sums: dict[int, torch.Tensor] = {}

    def start(self, slot: int, pooling: str) -> None:
        """A new sequence in `slot` wants "mean" or "last"."""
        self._pooling[slot] = pooling
        self._sums.pop(slot, None)

    def pool(self, step: Step, hidden: torch.Tensor) -> dict[int, torch.Tensor]:
        """Take in a step's hidden states [num_tokens, hidden_size].

        Returns:
            Finished embeddings by slot, [hidden_size] fp32 where `hidden` is; nothing waits.
        """
        embeddings = {}
        for row, done in zip(step.pool_rows.tolist(), step.pool_done.tolist(), strict=True):
            slot = int(step.slots[row])
            states = hidden[step.cu_seqlens_q[row] : step.cu_seqlens_q[row + 1]]
            num_tokens = int(step.positions[step.cu_seqlens_q[row + 1] - 1]) + 1
            if self._pooling[slot] == "last":
                pooled = states[-1].double()
            else:
                pooled = self._add(slot, states.double()) / num_tokens
            if done:
                embeddings[slot] = pooled.float()
        return embeddings

    def _add(self, slot: int, states: torch.Tensor) -> torch.Tensor:
        total = self._sums.get(slot)
        if total is not None:
            states = torch.cat((total[None], states))
        self._sums[slot] = states.cumsum(0)[-1]
        return self._sums[slot]
