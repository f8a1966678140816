"""Samplers of the device executor: DeviceSampler draws where the logits are, HostSampler does not.

Both draw the same tokens from the same logits; see kernels/sample/README.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from batchwright.exec.device.layout import Array
from batchwright.exec.device.slot_lists import SlotLists
from batchwright.exec.local import LOGITS_CHUNK
from batchwright.kernels.sample.layout import SLOT
from batchwright.kernels.token_logprobs.numba import token_logprobs
from batchwright.request import Int32Array
from batchwright.sampling.state import SamplingState
from batchwright.step import NewSequence, Step

Logprobs = tuple[torch.Tensor, ...]
"""The fields of TokenLogprobs as tensors."""

Views = Mapping[str, torch.Tensor]


class Drawn(NamedTuple):
    """Tokens of a step.

    Attributes:
        token_ids: [num_samples] int32 on the device; -1: none can be drawn.
        logprobs: a line for each, if any slot asked for them.
    """

    token_ids: torch.Tensor
    logprobs: Logprobs | None


class Sampler(Protocol):
    """Per-slot sampling state, and the draw of a step."""

    def add(self, new: NewSequence) -> None:
        """See SamplingState.add."""
        ...

    def inputs(self, step: Step, output_positions: Int32Array) -> dict[str, Array]:
        """What the draw of a step needs on the device, and what has changed there.

        Args:
            output_positions: [num_samples] output tokens the slot had before this draw.
        """
        ...

    def apply(self, views: Views) -> None:
        """Take over on the device what has changed; `views` are `inputs` there."""
        ...

    def draw(
        self, logits: torch.Tensor, step: Step, output_positions: Int32Array, views: Views
    ) -> Drawn:
        """One token per sample.

        Args:
            logits: [num_samples, vocab_size] on the device.
            views: `inputs` on the device.
        """
        ...

    def score(self, logits: torch.Tensor, step: Step, rows: slice, views: Views) -> Logprobs:
        """Log-probabilities of the given tokens `step.score_targets[rows]`.

        Args:
            logits: [number of rows, vocab_size] on the device, at most LOGITS_CHUNK rows.
            views: `inputs` on the device.
        """
        ...


class HostSampler:
    """Greedy draws by torch; all others by the CPU's sampler, which waits for the logits.

    Args: as SamplingState.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, vocab_size: int) -> None:
        self._state = SamplingState(max_num_seqs, max_model_len, vocab_size)

    def add(self, new: NewSequence) -> None:
        self._state.add(new)

    def inputs(self, step: Step, output_positions: Int32Array) -> dict[str, Array]:
        return {}

    def apply(self, views: Views) -> None:
        return

    def draw(
        self, logits: torch.Tensor, step: Step, output_positions: Int32Array, views: Views
    ) -> Drawn:
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
        there = torch.from_numpy(token_ids).to(logits.device)
        if logprobs is None:
            return Drawn(there, None)
        return Drawn(there, tuple(torch.from_numpy(column) for column in logprobs))

    def score(self, logits: torch.Tensor, step: Step, rows: slice, views: Views) -> Logprobs:
        on_host = logits.float().cpu().contiguous().numpy()
        found = token_logprobs(on_host, step.score_targets[rows], step.score_top)
        return tuple(torch.from_numpy(column) for column in found)


class DeviceSampler:
    """Draws by kernels/sample/triton.py; nothing waits, and no graph has recorded its memory.

    Args: as SamplingState.
        device: where the logits are.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, vocab_size: int, device: torch.device
    ) -> None:
        self._state = SamplingState(max_num_seqs, max_model_len, vocab_size)  # what was asked for
        self._device, self._vocab_size = device, vocab_size
        self._new: dict[int, None] = {}  # slots that the device does not have yet, in order
        self._special = np.zeros(max_num_seqs, np.bool_)  # more than a temperature

        words = SLOT.itemsize // 4
        self._slots = torch.zeros((max_num_seqs, words), dtype=torch.int32, device=device)
        self._lists = {
            name: SlotLists(name, max_num_seqs, longest, dtype, device)
            for name, longest, dtype in (
                ("bias_ids", 1, torch.int32),
                ("bias_values", 1, torch.float32),
                ("suppressed_ids", 1, torch.int32),
                ("history", max_model_len + 1, torch.int32),
            )
        }
        num_rows = max(max_num_seqs, LOGITS_CHUNK)
        self._rows = torch.arange(num_rows, dtype=torch.int32, device=device)
        self._scratch: Any = None
        self._sample = importlib.import_module("batchwright.kernels.sample.triton")
        self._logprobs = importlib.import_module("batchwright.kernels.token_logprobs.triton")

    def add(self, new: NewSequence) -> None:
        self._state.add(new)
        self._new[new.slot] = None
        self._special[new.slot] = self._state.is_special(new.slot)

    def inputs(self, step: Step, output_positions: Int32Array) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        if self._new:
            slots = np.array(list(self._new), np.int64)
            arrays = {"new_slots": slots, "new_lines": self._state.records(slots)}
            for name, lists in self._state.lists(slots).items():
                arrays |= self._lists[name].inputs(lists)
            self._new = {}
        if len(step.sample_slots):
            arrays |= {"draw_slots": step.sample_slots, "output_positions": output_positions}
        if step.masks is not None:
            lines = step.mask_of_sample
            if lines is None:
                lines = np.arange(len(step.sample_slots), dtype=np.int32)
            arrays |= {"masks": step.masks.view(np.int32), "mask_of_sample": lines}
        if self._num_top(step) >= 0:
            arrays["num_top"] = self._state.num_logprobs(step.sample_slots)
        if len(step.score_targets):
            arrays["score_targets"] = step.score_targets
        return arrays

    def _num_top(self, step: Step) -> int:
        """The most rivals that a slot asks for; -1: none asks for log-probabilities."""
        if not len(step.sample_slots):
            return -1
        return int(self._state.num_logprobs(step.sample_slots).max())

    def apply(self, views: Views) -> None:
        """What new sequences want, after the draws that are queued for those before them."""
        if "new_slots" in views:
            self._slots.index_copy_(0, views["new_slots"], views["new_lines"])
            for lists in self._lists.values():
                lists.apply(views)

    def draw(
        self, logits: torch.Tensor, step: Step, output_positions: Int32Array, views: Views
    ) -> Drawn:
        rows, slots = self._rows[: len(logits)], views["draw_slots"]
        is_special = bool(self._special[step.sample_slots].any())
        if is_special and self._scratch is None:
            self._scratch = self._sample.make_scratch(
                len(self._slots), self._vocab_size, self._device
            )
        table = self._slots.view(torch.uint8)
        lists = {name: one.lines for name, one in self._lists.items()}
        token_ids = self._sample.sample_rows(
            logits,
            rows,
            slots,
            views["output_positions"],
            table,
            **lists,
            allowed=views.get("masks"),
            mask_of_sample=views.get("mask_of_sample"),
            scratch=self._scratch if is_special else None,
        )
        if is_special:
            self._sample.append_tokens(table, lists["history"], slots, token_ids)
        num_top = self._num_top(step)
        if num_top < 0:
            return Drawn(token_ids, None)
        return Drawn(token_ids, self._told(logits, token_ids, views["num_top"], num_top))

    def score(self, logits: torch.Tensor, step: Step, rows: slice, views: Views) -> Logprobs:
        targets = views["score_targets"][rows]
        num_top = torch.full_like(targets, step.score_top)
        return self._told(logits, targets, num_top, step.score_top)

    def _told(
        self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: torch.Tensor, max_top: int
    ) -> Logprobs:
        """Log-probabilities of a token of each row."""
        rows, max_top = self._rows[: len(logits)], min(max_top, self._vocab_size)
        found = self._logprobs.logprob_rows(logits, rows, token_ids, num_top, max_top=max_top)
        return tuple(found)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """[num_rows] int32: the token of the largest logit; -1 for a row with a NaN or +inf."""
    best, token_ids = logits.max(dim=1)
    return torch.where(best.isfinite(), token_ids, -1).int()
