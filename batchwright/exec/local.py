"""LocalExecutor: one model on the CPU, or one rank's part of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from batchwright.attention.backend import AttentionBackend, AttentionBatch, GroupBatch
from batchwright.attention.backends.numba import Backend
from batchwright.attention.context import AttentionContext
from batchwright.exec.pooling import Pooler
from batchwright.exec.slot_state import SlotState
from batchwright.exec.step_programs import StepPrograms
from batchwright.kernels.token_logprobs.numba import token_logprobs
from batchwright.kv.groups import KVGroup
from batchwright.models.causal_lm import CausalLM
from batchwright.models.layers import Linear
from batchwright.request import Int32Array
from batchwright.sampling.state import SamplingState
from batchwright.step import NewSequence, Step, StepResult, TokenLogprobs
from batchwright.tensor_parallel.ranks import Ranks

LOGITS_CHUNK = 64
"""Rows of logits that exist at once when scoring: 64 x 49,152 fp32 are 12 MiB, and products are
already at their full speed."""


class LocalExecutor:
    """Computes Steps with a model, an attention backend and the KV memory between them.

    Args:
        model: from `models.loader`.
        backend: attention; owns the KV layout.
        groups: KV groups with their pool sizes.
        group_of_layer: KV group of every layer.
        block_size: tokens per block.
        max_num_seqs: slots.
        max_model_len: most tokens of a sequence.
        vocab_size: columns of the logits.
        ranks: those that have the model together. Beside rank 0 they get Steps without what only
            drawing needs, and take the drawn tokens over; nobody reads their results.
    Attributes:
        programs: what runs steps of few tokens, if something does.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        groups: Sequence[KVGroup],
        group_of_layer: Sequence[int],
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int,
        ranks: Ranks | None = None,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._draws = ranks is None or ranks.rank == 0
        self._backend = backend
        self._group_of_layer = group_of_layer
        self._block_size = block_size
        self._kv_layers = [
            backend.allocate(spec, groups[group].num_blocks, block_size, model.dtype)
            for spec, group in zip(model.attention_specs, group_of_layer, strict=True)
        ]
        self.programs: StepPrograms | None = None
        if ranks is None and isinstance(backend, Backend):
            self.programs = StepPrograms(model, backend, self._kv_layers, group_of_layer)
        max_blocks = -(-max_model_len // block_size)
        self._slots = SlotState(len(groups), max_num_seqs, max_blocks)
        self._sampling = SamplingState(max_num_seqs, max_model_len, vocab_size)
        self._pooler = Pooler()
        head = model.get_submodule("lm_head")
        assert isinstance(head, Linear)
        head.reuses_output = True
        self._num_prompt: Int32Array = np.zeros(max_num_seqs, np.int32)

    @torch.inference_mode()
    def execute(self, step: Step) -> StepResult:
        """See `Executor`. Level bits in fp32: no row depends on the others of its Step."""
        for new in step.new_sequences:
            self._install(new)
        self._slots.apply(step)
        self._copy_kv(step)
        hidden = self._forward(step)
        token_ids, sample_logprobs = self._sample(step, hidden)
        embeddings = None
        if len(step.pool_rows):
            pooled = self._pooler.pool(step, hidden)
            embeddings = {slot: one.numpy() for slot, one in pooled.items()}
        return StepResult(
            step_id=step.step_id,
            token_ids=token_ids,
            sample_logprobs=sample_logprobs,
            score_logprobs=self._score(step, hidden) if len(step.score_tokens) else None,
            embeddings=embeddings,
        )

    def close(self) -> None:
        self.programs = None
        self._kv_layers.clear()

    def _install(self, new: NewSequence) -> None:
        self._num_prompt[new.slot] = new.num_prompt_tokens
        if new.pooling is not None:
            self._pooler.start(new.slot, new.pooling)
        else:
            self._sampling.add(new)

    def _copy_kv(self, step: Step) -> None:
        for layer, group in zip(self._kv_layers, self._group_of_layer, strict=True):
            if len(step.block_copies[group]):
                layer.copy_blocks(step.block_copies[group])
            if step.kv_copies is not None:
                layer.copy_tokens(step.kv_copies)

    def _forward(self, step: Step) -> torch.Tensor:
        """[num_tokens, hidden_size] after the final norm."""
        position_ids = step.positions if step.position_ids is None else step.position_ids
        batch = AttentionBatch(
            slots=step.slots,
            cu_seqlens_q=step.cu_seqlens_q,
            positions=step.positions,
            position_ids=position_ids,
            groups=tuple(
                GroupBatch(block_table=table, slot_mapping=kv_slots)
                for table, kv_slots in zip(self._slots.block_tables, step.kv_slots, strict=True)
            ),
            block_size=self._block_size,
        )
        token_ids = torch.from_numpy(self._slots.token_ids(step)).long()
        x = self._model.embed(token_ids, torch.from_numpy(position_ids).long())
        hidden = None if self.programs is None else self.programs.run(x, batch)
        if hidden is None:
            plan = self._backend.plan(batch)
            attend = AttentionContext(self._backend, self._kv_layers, self._group_of_layer, plan)
            hidden = self._model.through_layers(x, attend)
        return hidden

    def _logits(self, hidden: torch.Tensor, tokens: Int32Array) -> np.ndarray:
        """[num tokens given, vocab_size] fp32."""
        rows = hidden[torch.from_numpy(tokens).long()]
        return self._model.logits(rows).float().contiguous().numpy()

    def _sample(self, step: Step, hidden: torch.Tensor) -> tuple[Int32Array, TokenLogprobs | None]:
        if not len(step.sample_tokens):
            return np.empty(0, np.int32), None
        tokens, row_of_sample = np.unique(step.sample_tokens, return_inverse=True)
        slots = step.sample_slots
        output_positions = step.positions[step.sample_tokens] + 1 - self._num_prompt[slots]
        logits = self._logits(hidden, tokens)
        token_ids, logprobs = np.empty(len(slots), np.int32), None
        if self._draws:
            token_ids, logprobs = self._sampling.sample(
                logits,
                row_of_sample.astype(np.int32),
                slots,
                output_positions,
                step.masks,
                step.mask_of_sample,
            )
            self._sampling.append(slots, token_ids)
        if self._ranks is not None:
            self._ranks.share(torch.from_numpy(token_ids))
        self._slots.note_sampled(slots, token_ids)
        return token_ids, logprobs

    def _score(self, step: Step, hidden: torch.Tensor) -> TokenLogprobs | None:
        """Score given tokens a chunk of rows at a time: never a [num_tokens, vocab] tensor."""
        chunks = []
        for start in range(0, len(step.score_tokens), LOGITS_CHUNK):
            rows = slice(start, start + LOGITS_CHUNK)
            logits = self._logits(hidden, step.score_tokens[rows])
            if self._draws:
                chunks.append(token_logprobs(logits, step.score_targets[rows], step.score_top))
        if not self._draws:
            return None
        return TokenLogprobs(*(np.concatenate(column) for column in zip(*chunks, strict=True)))
