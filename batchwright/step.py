"""`Step` and `StepResult`: the plain data in which deciding and computing meet.

The scheduler writes Steps and reads StepResults; an executor does the opposite. There is no
prefill and no decode: a row of a Step is a run of tokens of one sequence that are to be computed,
whatever put them there. A Step carries changes only; an executor keeps, per slot, the block
tables, the sampling state and the last token it sampled.

Dimension names: num_rows rows (one per sequence that computes in this step), num_tokens query
tokens (all rows, flat), num_samples draws, one per sequence that receives a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.request import Float32Array, Int32Array, SamplingParams

BoolArray = npt.NDArray[np.bool_]
UInt32Array = npt.NDArray[np.uint32]

LAST_SAMPLED = -1
"""Query token id meaning: the token this slot sampled last; the scheduler may not know it yet."""

NO_WRITE = -1
"""KV slot meaning: this token's KV is already there (a shared block); attend, do not write."""


class NewSequence(NamedTuple):
    """A sequence that takes a slot, new or back after preemption."""

    slot: int
    token_ids: Int32Array  # all known tokens: prompt, then what was generated before preemption
    num_prompt_tokens: int
    params: SamplingParams
    noise_key: int  # uint64: hash of (seed, row id); see sampling/noise.py
    sample_index: int
    end_token_ids: tuple[int, ...]  # model end tokens and stop tokens that end this sequence
    pooling: str | None = None  # "mean" or "last" when hidden states are wanted


class TableUpdate(NamedTuple):
    """Block-table entries to set before computing: table[slots[i], indices[i]] = block_ids[i]."""

    slots: Int32Array
    indices: Int32Array
    block_ids: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One forward pass. All arrays int32 unless stated; tuples hold one entry per KV group.

    Order of work: release `finished_slots`; install `new_sequences`; copy `saved_blocks` to the
    host; apply `table_updates`; do `block_copies` (source, destination; all sources are read before
    any write of this step), then `loaded_blocks` from the host, then `kv_copies` of single tokens;
    compute. KV of every token of the step is written before any token of the same layer attends,
    so a row may read blocks that another row of the same step writes.
    """

    step_id: int
    finished_slots: Int32Array  # [n] released since the last step
    new_sequences: tuple[NewSequence, ...]
    table_updates: tuple[TableUpdate, ...]
    block_copies: tuple[Int32Array, ...]  # each [n, 2]
    saved_blocks: Int32Array | None = None  # [n, 2] block, host block; one KV group
    loaded_blocks: Int32Array | None = None  # [n, 2] host block, block; one KV group
    kv_copies: Int32Array | None = None  # [n, 2] KV slots, source and destination; one KV group

    slots: Int32Array  # [num_rows]
    cu_seqlens_q: Int32Array  # [num_rows + 1], row i owns query tokens [cu[i], cu[i+1])
    token_ids: Int32Array  # [num_tokens], or LAST_SAMPLED
    positions: Int32Array  # [num_tokens] index in the sequence
    kv_slots: tuple[
        Int32Array, ...
    ]  # each [num_tokens]: block_id * block_size + offset, or NO_WRITE
    position_ids: Int32Array | None = None  # [num_tokens] what the model is told; None: positions
    parents: Int32Array | None = None  # [num_tokens] query index of the parent token (trees)
    adapter_ids: Int32Array | None = None  # [num_rows]

    sample_tokens: Int32Array  # [num_samples] query token whose logits are sampled (may repeat)
    sample_slots: Int32Array  # [num_samples] the slot that receives the token
    mask_of_sample: Int32Array | None = None  # [num_samples] line of `masks`, -1: unrestricted
    masks: UInt32Array | None = None  # [num_masks, >= vocab_size / 32] bit v: token v is allowed
    score_tokens: Int32Array  # [num_scored] query token whose logits score the token after it
    score_targets: Int32Array  # [num_scored] that next token
    score_top: int = 0  # alternatives to report per scored token, the most any row asks for
    pool_rows: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))  # rows to pool
    pool_done: BoolArray = field(default_factory=lambda: np.empty(0, np.bool_))  # last chunk?

    @property
    def num_tokens(self) -> int:
        """Query tokens of this step."""
        return len(self.token_ids)

    @property
    def num_swapped(self) -> int:
        """Blocks that are copied to the host and from it."""
        return sum(len(x) for x in (self.saved_blocks, self.loaded_blocks) if x is not None)

    @property
    def num_rows(self) -> int:
        """Sequences that compute in this step."""
        return len(self.slots)


class TokenLogprobs(NamedTuple):
    """Log-probabilities of chosen tokens, one line per token, with the likeliest rivals.

    Raw-logit log-probabilities (before temperature, penalties, filters), natural log.
    """

    logprobs: Float32Array  # [num] of the chosen or given token
    ranks: Int32Array  # [num] 1 + number of tokens that are strictly likelier
    top_ids: Int32Array  # [num, k], likeliest first, ties by lower id
    top_logprobs: Float32Array  # [num, k]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepResult:
    """What a Step produced. `update(result)` may reach the scheduler one Step late."""

    step_id: int
    token_ids: Int32Array  # [num_samples]
    sample_logprobs: TokenLogprobs | None = None  # lines for all samples, if any slot asked
    score_logprobs: TokenLogprobs | None = None  # [num_scored] lines
    embeddings: dict[int, Float32Array] | None = None  # slot -> [hidden_size], for pool_done rows

    def wait(self) -> StepResult:
        """Itself: it is there already; see `exec.executor.PendingResult`."""
        return self


class EqualSteps(NamedTuple):
    """Coming Steps in which the same rows compute one token each, for a simulator.

    What a row is given to write to is its own; nothing is copied.

    Attributes:
        finished_slots: [n] int32, released since the last Step.
        slots: [num_rows] int32, in the order of their rows.
        positions: [num_rows] int32, of each row's token in the first of these Steps.
        num_steps: at least 1; no row reaches its limit before the last.
    """

    finished_slots: Int32Array
    slots: Int32Array
    positions: Int32Array
    num_steps: int


class EqualResults(NamedTuple):
    """What the first `num_steps` of EqualSteps drew.

    Attributes:
        ordinary_ids: [num_rows] int32, drawn in all of them but the last; ends no row.
        token_ids: [num_rows] int32, drawn in the last.
    """

    num_steps: int
    ordinary_ids: Int32Array
    token_ids: Int32Array
