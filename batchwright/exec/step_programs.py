"""Steps of few tokens on a CPU as programs: recorded once for each number of tokens, then re-run.

See `kernels/program.py`. Models that do more than call our kernels (some norms, mixtures of
experts, 16-bit models) cannot be recorded, which shows at the first try; they go on as before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from batchwright.attention.backend import AttentionBatch, GroupBatch, KVLayer
from batchwright.attention.backends.numba import Backend, LastingStepPlan
from batchwright.attention.context import AttentionContext
from batchwright.kernels.program import CannotRecord, Program, record
from batchwright.models.causal_lm import CausalLM

MAX_TOKENS = 128
"""Of a step. With more, what calls cost beside their work is little of it."""

MAX_PROGRAMS = 32
"""Kept at a time. Rows of a batch end one by one: each number of them lasts for some steps."""


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
        self._max_tokens = MAX_TOKENS
        self._seen: set[int] = set()
        self._programs: OrderedDict[int, _StepProgram] = OrderedDict()

    def run(self, x: torch.Tensor, batch: AttentionBatch) -> torch.Tensor | None:
        """What the model makes of x, or None: it is to be computed call by call.

        Args:
            x: [num_tokens, hidden_size] from `CausalLM.embed`, not changed.
        Returns:
            [num_tokens, hidden_size], valid until the next step.
        """
        num_tokens = len(x)
        if num_tokens > self._max_tokens:
            return None
        program = self._programs.get(num_tokens)
        if program is not None:
            self._programs.move_to_end(num_tokens)
            return program.run(x, batch)
        if num_tokens not in self._seen:  # it may be the only step of so many tokens
            self._seen.add(num_tokens)
            return None
        try:
            program = _StepProgram(x, batch)
            hidden = program.record(
                self._model, self._backend, self._kv_layers, self._group_of_layer
            )
        except CannotRecord:
            self._max_tokens = num_tokens - 1  # more tokens take more memory
            return None
        self._programs[num_tokens] = program
        if len(self._programs) > MAX_PROGRAMS:
            self._programs.popitem(last=False)
        return hidden


class _StepProgram:
    """A program, and the memory in which it finds a step."""

    def __init__(self, x: torch.Tensor, batch: AttentionBatch) -> None:
        self._x = x.clone()
        self._batch = replace(
            batch,
            position_ids=batch.position_ids.copy(),
            groups=tuple(
                GroupBatch(block_table=group.block_table, slot_mapping=group.slot_mapping.copy())
                for group in batch.groups
            ),
        )
        self._plan = LastingStepPlan(self._batch)
        self._program: Program | None = None

    def record(
        self,
        model: CausalLM,
        backend: Backend,
        kv_layers: Sequence[KVLayer],
        group_of_layer: Sequence[int],
    ) -> torch.Tensor:
        """Compute the step that it was made with, and remember how."""
        attend = AttentionContext(backend, kv_layers, group_of_layer, self._plan)
        hidden, self._program = record(lambda: model.through_layers(self._x, attend))
        return hidden

    def run(self, x: torch.Tensor, step: AttentionBatch) -> torch.Tensor:
        """Compute another step of as many tokens."""
        assert self._program is not None
        self._x.copy_(x)
        np.copyto(self._batch.position_ids, step.position_ids)
        for group, new in zip(self._batch.groups, step.groups, strict=True):
            np.copyto(group.slot_mapping, new.slot_mapping)
        self._plan.renew(step)
        return self._program.run()
