"""What an executor keeps per slot between Steps: block tables and the last sampled token."""

from __future__ import annotations

import numpy as np

from batchwright.request import Int32Array
from batchwright.step import LAST_SAMPLED, Step


class SlotState:
    """Per-slot arrays an executor needs to complete a Step, which carries changes only."""

    def __init__(self, num_groups: int, max_num_seqs: int, max_blocks: int) -> None:
        self.block_tables = [
            np.zeros((max_num_seqs, max_blocks), np.int32) for _ in range(num_groups)
        ]
        self._last_token: Int32Array = np.zeros(max_num_seqs, np.int32)

    def apply(self, step: Step) -> None:
        """Take over the Step's block-table changes."""
        for table, update in zip(self.block_tables, step.table_updates, strict=True):
            table[update.slots, update.indices] = update.block_ids

    def token_ids(self, step: Step) -> Int32Array:
        """[num_tokens] the Step's tokens with LAST_SAMPLED filled in."""
        rows = np.repeat(step.slots, np.diff(step.cu_seqlens_q))
        return np.where(step.token_ids == LAST_SAMPLED, self._last_token[rows], step.token_ids)

    def note_sampled(self, slots: Int32Array, token_ids: Int32Array) -> None:
        """Remember each slot's newest token.

        -1 stands for none: that sequence has failed, but a Step that goes on with it may already
        be made. It gets some token then, and nobody reads what comes of it.
        """
        self._last_token[slots] = np.maximum(token_ids, 0)
