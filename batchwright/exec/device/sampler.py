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
from batchwright.kernels.sample.layout import SLOT
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


class DeviceSampler:
    """Draws by kernels/sample/triton.py; nothing waits.

    Args: as SamplingState.
        device: where the logits are.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, vocab_size: int, device: torch.device
    ) -> None:
        self._state = SamplingState(max_num_seqs, max_model_len, vocab_size)  # what was asked for
        self._device, self._vocab_size = device, vocab_size
        self._new: list[int] = []  # slots whose lines the device does not have yet
        self._special = np.zeros(max_num_seqs, np.bool_)  # more than a temperature

        def lines(width: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros((max_num_seqs, width), dtype=dtype, device=device)

        self._slots = lines(SLOT.itemsize // 4)
        self._bias_ids, self._bias_values = lines(1), lines(1, torch.float32)
        self._suppressed = lines(8)
        self._history = lines(max_model_len + 1)
        self._rows = torch.arange(max_num_seqs, dtype=torch.int32, device=device)
        self._scratch: Any = None
        self._sample = importlib.import_module("batchwright.kernels.sample.triton")
        self._logprobs = importlib.import_module("batchwright.kernels.token_logprobs.triton")

    def add(self, new: NewSequence) -> None:
        self._state.add(new)
        if new.slot not in self._new:
            self._new.append(new.slot)
        line = self._state.line(new.slot)
        self._special[new.slot] = self._state.is_special(new.slot)
        if line.num_tokens:
            tokens = torch.from_numpy(np.ascontiguousarray(new.token_ids))
            self._history[new.slot, : line.num_tokens].copy_(tokens)
        if line.num_biased:
            self._bias_ids = _widened(self._bias_ids, line.num_biased)
            self._bias_values = _widened(self._bias_values, line.num_biased)
            self._bias_ids[new.slot, : line.num_biased].copy_(torch.from_numpy(line.bias_ids))
            values = torch.from_numpy(line.bias_values)
            self._bias_values[new.slot, : line.num_biased].copy_(values)
        if line.num_suppressed and new.params.min_tokens:
            self._suppressed = _widened(self._suppressed, line.num_suppressed)
            ids = torch.from_numpy(line.suppressed_ids)
            self._suppressed[new.slot, : line.num_suppressed].copy_(ids)

    def inputs(self, step: Step, output_positions: Int32Array) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        if self._new:
            slots = np.array(self._new, np.int64)
            arrays = {"new_slots": slots, "new_lines": self._state.records(slots)}
            self._new = []
        if len(step.sample_slots):
            arrays |= {"draw_slots": step.sample_slots, "output_positions": output_positions}
        if step.masks is not None:
            lines = step.mask_of_sample
            if lines is None:
                lines = np.arange(len(step.sample_slots), dtype=np.int32)
            arrays |= {"masks": step.masks.view(np.int32), "mask_of_sample": lines}
        if self._num_top(step) >= 0:
            arrays["num_top"] = self._state.num_logprobs(step.sample_slots)
        return arrays

    def _num_top(self, step: Step) -> int:
        """The most rivals that a slot asks for; -1: none asks for log-probabilities."""
        if not len(step.sample_slots):
            return -1
        return int(self._state.num_logprobs(step.sample_slots).max())

    def apply(self, views: Views) -> None:
        """Lines of new sequences."""
        if "new_slots" in views:
            self._slots.index_copy_(0, views["new_slots"], views["new_lines"])

    def draw(
        self, logits: torch.Tensor, step: Step, output_positions: Int32Array, views: Views
    ) -> Drawn:
        rows, slots = self._rows[: len(logits)], views["draw_slots"]
        is_special = bool(self._special[step.sample_slots].any())
        if is_special and self._scratch is None:
            self._scratch = self._sample.make_scratch(
                len(self._rows), self._vocab_size, self._device
            )
        table = self._slots.view(torch.uint8)
        token_ids = self._sample.sample_rows(
            logits,
            rows,
            slots,
            views["output_positions"],
            table,
            bias_ids=self._bias_ids,
            bias_values=self._bias_values,
            suppressed_ids=self._suppressed,
            history=self._history,
            allowed=views.get("masks"),
            mask_of_sample=views.get("mask_of_sample"),
            scratch=self._scratch if is_special else None,
        )
        if is_special:
            self._sample.append_tokens(table, self._history, slots, token_ids)
        num_top = self._num_top(step)
        if num_top < 0:
            return Drawn(token_ids, None)
        found = self._logprobs.logprob_rows(
            logits, rows, token_ids, views["num_top"], max_top=num_top
        )
        return Drawn(token_ids, tuple(found))


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """[num_rows] int32: the token of the largest logit; -1 for a row with a NaN or +inf."""
    best, token_ids = logits.max(dim=1)
    return torch.where(best.isfinite(), token_ids, -1).int()


def _widened(lines: torch.Tensor, width: int) -> torch.Tensor:
    """`lines` itself, or a copy with at least twice the columns if it is too narrow."""
    if width <= lines.shape[1]:
        return lines
    wider = lines.new_zeros(len(lines), max(width, 2 * lines.shape[1]))
    wider[:, : lines.shape[1]] = lines
    return wider
