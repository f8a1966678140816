"""Steps on a CPU as programs: recorded once for each number of tokens, then run again.

See `kernels/program.py`. Models that do more than call our kernels (some norms, mixtures of
experts, 16-bit models) cannot be recorded, which shows at the first try; they go on as before.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from batchwright.attention.backend import AttentionBatch, KVLayer
from batchwright.attention.backends.numba import Backend, LastingStepPlan
from batchwright.attention.context import AttentionContext
from batchwright.kernels.program import CannotRecord, Program, SharedMemory, check, record
from batchwright.models.causal_lm import CausalLM

MAX_TOKENS = 1024
"""Of a step. With more, what calls cost beside their work is little of it, and memory that stays
taken between steps is much."""

MAX_PROGRAMS = 32
"""Kept at a time. Rows of a batch end one by one: each number of them lasts for some steps."""

RECORD_AT = 3
"""Which step of as many tokens is recorded, for what a few later ones save."""

PRODUCTS = ("linear", "int8_linear")
ATTENTION = ("rotary_kv_write", "paged_attention")
"""Kernels, by what they are a part of."""


class StepPrograms:
    """A model's layers, run as programs where they can be and it pays.

    Args:
        model, backend, kv_layers, group_of_layer: of the executor.

    Level bits: the same kernels run on the same numbers.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        kv_layers: Sequence[KVLayer],
        group_of_layer: Sequence[int],
    ) -> None:
        self._model = model
        self._backend = backend
        self._kv_layers = kv_layers
        self._group_of_layer = group_of_layer
        self._memory = SharedMemory()
        self._x = torch.empty(0)
        self._can_record, self._is_checked = True, False
        self._seen: Counter[int] = Counter()
        self._programs: OrderedDict[int, _StepProgram] = OrderedDict()
        self._dropped_s: Counter[str] = Counter()

    def run(self, x: torch.Tensor, batch: AttentionBatch) -> torch.Tensor | None:
        """What the model makes of x, or None: it is to be computed call by call.

        Args:
            x: [num_tokens, hidden_size] from `CausalLM.embed`, not changed.
        Returns:
            [num_tokens, hidden_size], valid until the next step.
        """
        num_tokens = len(x)
        if not self._can_record or num_tokens > MAX_TOKENS:
            return None
        program = self._programs.get(num_tokens)
        if program is not None:
            self._programs.move_to_end(num_tokens)
            return program.run(x, batch)
        try:
            if not self._is_checked:
                return self._check(x, batch)
            self._seen[num_tokens] += 1
            if self._seen[num_tokens] < RECORD_AT:
                return None
            hidden, self._programs[num_tokens] = self._record(x, batch)
        except CannotRecord:
            self._can_record = False
            return None
        if len(self._programs) > MAX_PROGRAMS:
            oldest, dropped = self._programs.popitem(last=False)
            self._dropped_s.update(dropped.program.seconds_by_kernel())
            del self._seen[oldest]
        return hidden

    def seconds_by_kernel(self) -> Counter[str]:
        """What programs took so far."""
        seconds = Counter(self._dropped_s)
        for one in self._programs.values():
            seconds.update(one.program.seconds_by_kernel())
        return seconds

    def _check(self, x: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Compute a step and see whether others can be recorded."""
        copy, attend = x.clone(), self._attend(self._backend.plan(batch))
        hidden = check(lambda: self._model.through_layers(copy, attend))
        self._is_checked = True
        return hidden

    def _record(self, x: torch.Tensor, batch: AttentionBatch) -> tuple[torch.Tensor, _StepProgram]:
        """Compute a step, and remember how."""
        if not len(self._x):  # pages that no step writes are not taken
            self._x = torch.empty(MAX_TOKENS, x.shape[1], dtype=x.dtype)
        x, batch = self._x[: len(x)].copy_(x), _copy(batch)
        plan = LastingStepPlan(batch)
        attend = self._attend(plan)
        hidden, program = record(lambda: self._model.through_layers(x, attend), self._memory)
        return hidden, _StepProgram(program, x, batch, plan)

    def _attend(self, plan: Any) -> AttentionContext:
        return AttentionContext(self._backend, self._kv_layers, self._group_of_layer, plan)


@dataclass(frozen=True, slots=True, eq=False)
class _StepProgram:
    """A program, and the memory in which it finds a step."""

    program: Program
    x: torch.Tensor
    batch: AttentionBatch
    plan: LastingStepPlan

    def run(self, x: torch.Tensor, step: AttentionBatch) -> torch.Tensor:
        """Compute another step of as many tokens."""
        self.x.copy_(x)
        np.copyto(self.batch.position_ids, step.position_ids)
        for group, new in zip(self.batch.groups, step.groups, strict=True):
            np.copyto(group.slot_mapping, new.slot_mapping)
        self.plan.renew(step)
        return self.program.run()


def _copy(batch: AttentionBatch) -> AttentionBatch:
    """With arrays of its own for what kernels read, but for the block tables, which stay."""
    groups = (replace(group, slot_mapping=group.slot_mapping.copy()) for group in batch.groups)
    return replace(batch, position_ids=batch.position_ids.copy(), groups=tuple(groups))
