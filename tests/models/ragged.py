"""Runs a model over several sequences at once, in chunks, through an attention backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from batchwright.attention.backend import AttentionBackend, AttentionBatch, GroupBatch
from batchwright.attention.backends.torch_ref import Backend as TorchReference
from batchwright.attention.context import AttentionContext
from batchwright.models.causal_lm import CausalLM

BLOCK_SIZE = 32


def ragged_logits(
    model: CausalLM,
    sequences: Sequence[torch.Tensor],
    *,
    chunk: int | None = None,
    backend: AttentionBackend | None = None,
    position_offset: int = 0,
) -> list[torch.Tensor]:
    """Logits of all tokens, each step computing up to `chunk` tokens of every sequence.

    Args:
        sequences: token ids, [length] int64 each.
        chunk: None computes everything in one step.
        backend: TorchReference by default.
        position_offset: added to the positions the model sees (a wrong one is a negative control).
    Returns:
        [length, vocab_size] fp32 for each sequence.
    """
    backend = backend or TorchReference()
    lengths = [len(ids) for ids in sequences]
    chunk = chunk or max(lengths)
    tables = _shuffled_block_tables(lengths)
    dtype = model.dtype
    kv_layers = [
        backend.allocate(spec, tables.size, BLOCK_SIZE, dtype) for spec in model.attention_specs
    ]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for start in range(0, max(lengths), chunk):
        rows = [row for row, length in enumerate(lengths) if length > start]
        pieces = [sequences[row][start : start + chunk] for row in rows]
        counts = [len(piece) for piece in pieces]
        batch = _batch(tables, rows, counts, start)
        attend = AttentionContext(backend, kv_layers, [0] * len(kv_layers), backend.plan(batch))
        with torch.inference_mode():
            positions = torch.from_numpy(batch.positions).long() + position_offset
            hidden = model(torch.cat(pieces), positions, attend)
            step_logits = model.logits(hidden).float().split(counts)
        for row, piece_logits in zip(rows, step_logits, strict=True):
            logits[row].append(piece_logits)
    return [torch.cat(pieces) for pieces in logits]


def _batch(
    tables: np.ndarray, rows: Sequence[int], counts: Sequence[int], start: int
) -> AttentionBatch:
    positions = np.concatenate([np.arange(start, start + count) for count in counts])
    owners = np.repeat(rows, counts)
    slots = tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return AttentionBatch(
        slots=np.array(rows, np.int32),
        cu_seqlens_q=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        positions=positions.astype(np.int32),
        position_ids=positions.astype(np.int32),
        groups=(GroupBatch(block_table=tables, slot_mapping=slots.astype(np.int32)),),
        block_size=BLOCK_SIZE,
    )


def _shuffled_block_tables(lengths: Sequence[int]) -> np.ndarray:
    """[num_sequences, max_blocks] int32; blocks are in no order, so that tables matter."""
    shape = (len(lengths), -(-max(lengths) // BLOCK_SIZE))
    blocks = np.random.default_rng(0).permutation(shape[0] * shape[1])
    return blocks.reshape(shape).astype(np.int32)
