"""Slots on the device, and what changes a row before temperature and filters. Triton.

A slot is the bytes of a layout.SLOT, read as numbers of the size of each field.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchwright.kernels.sample.layout import SLOT


def _place(name: str, num_bytes: int) -> tl.constexpr:
    """Where a field of that size begins in a slot, counted in its own size."""
    assert SLOT.fields is not None
    return tl.constexpr(int(SLOT.fields[name][1]) // num_bytes)


WORDS = tl.constexpr(SLOT.itemsize // 4)
NOISE_KEY = _place("noise_key", 8)
TEMPERATURE = _place("temperature", 8)
TOP_P = _place("top_p", 8)
MIN_P = _place("min_p", 8)
TOP_K = _place("top_k", 4)
REPETITION_PENALTY = _place("repetition_penalty", 4)
PRESENCE_PENALTY = _place("presence_penalty", 4)
FREQUENCY_PENALTY = _place("frequency_penalty", 4)
SAMPLE_INDEX = _place("sample_index", 4)
MIN_TOKENS = _place("min_tokens", 4)
NUM_BIASED = _place("num_biased", 4)
NUM_SUPPRESSED = _place("num_suppressed", 4)
NUM_PROMPT_TOKENS = _place("num_prompt_tokens", 4)
NUM_TOKENS = _place("num_tokens", 4)
_IN_PROMPT = tl.constexpr(1 << 30)


@triton.jit
def is_adjusted_slot(slot: tl.tensor, position: tl.tensor) -> tl.tensor:
    """The slot (as int32) changes logits before temperature and filters."""
    suppressed = (tl.load(slot + NUM_SUPPRESSED) > 0) & (position < tl.load(slot + MIN_TOKENS))
    return (tl.load(slot + NUM_TOKENS) > 0) | (tl.load(slot + NUM_BIASED) > 0) | suppressed


@triton.jit
def is_filtered_slot(slot: tl.tensor, slot_f64: tl.tensor, VOCAB_SIZE: tl.constexpr) -> tl.tensor:
    """The slot draws at random from a part of its row."""
    top_k = tl.load(slot + TOP_K)
    has_top_k = (top_k > 0) & (top_k < VOCAB_SIZE)
    has_p = (tl.load(slot_f64 + TOP_P) < 1.0) | (tl.load(slot_f64 + MIN_P) > 0.0)
    return (has_top_k | has_p) & (tl.load(slot_f64 + TEMPERATURE) != 0.0)


@triton.jit
def adjust(
    logits: tl.tensor,
    row: tl.tensor,
    counts: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    slot: tl.tensor,
    slot_f32: tl.tensor,
    position: tl.tensor,
    bias_ids: tl.tensor,
    bias_values: tl.tensor,
    suppressed_ids: tl.tensor,
    history: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """logits into row, then bias, penalties and suppressed tokens, in the order of adjust.py."""
    tl.debug_barrier()  # the line's last row may still be read
    lane = tl.arange(0, BLOCK)
    for start in range(0, VOCAB_SIZE, BLOCK):
        inside = start + lane < VOCAB_SIZE
        value = tl.load(logits + start + lane, mask=inside).to(tl.float32)
        tl.store(row + start + lane, value, mask=inside)
    tl.debug_barrier()
    num_biased = tl.load(slot + NUM_BIASED)
    start = 0  # distinct ids
    while start < num_biased:
        there = start + lane < num_biased
        token = tl.load(bias_ids + start + lane, mask=there, other=0)
        value = tl.load(row + token, mask=there, other=0.0)
        bias = tl.load(bias_values + start + lane, mask=there, other=0.0)
        tl.store(row + token, value + bias, mask=there)
        start += BLOCK
    tl.debug_barrier()

    num_tokens = tl.load(slot + NUM_TOKENS)
    num_prompt = tl.load(slot + NUM_PROMPT_TOKENS)
    repetition = tl.load(slot_f32 + REPETITION_PENALTY)
    frequency = tl.load(slot_f32 + FREQUENCY_PENALTY)
    presence = tl.load(slot_f32 + PRESENCE_PENALTY)
    first = tl.where(repetition != 1.0, 0, num_prompt)
    start = first
    while start < num_tokens:
        i = start + lane
        token = tl.load(history + i, mask=i < num_tokens, other=-1)
        known = (token >= 0) & (token < VOCAB_SIZE)
        tl.atomic_or(counts + token, _IN_PROMPT, mask=known & (i < num_prompt))
        tl.atomic_add(counts + token, 1, mask=known & (i >= num_prompt))
        start += BLOCK
    tl.debug_barrier()
    start = first
    while start < num_tokens:
        i = start + lane
        token = tl.load(history + i, mask=i < num_tokens, other=-1)
        known = (token >= 0) & (token < VOCAB_SIZE)
        # the first of equal tokens to come takes the count and leaves zero
        count = tl.atomic_xchg(counts + token, 0, mask=known)
        changes = known & (count != 0)
        count = count & (_IN_PROMPT - 1)
        value = tl.load(row + token, mask=changes, other=0.0)
        if repetition != 1.0:
            repeated = tl.zeros([BLOCK], tl.float32) + repetition
            value = tl.where(value > 0.0, tl.div_rn(value, repeated), value * repetition)
        less = (value - frequency * count.to(tl.float32)) - presence
        tl.store(row + token, tl.where(count > 0, less, value), mask=changes)
        start += BLOCK
    tl.debug_barrier()

    if position < tl.load(slot + MIN_TOKENS):
        num_suppressed = tl.load(slot + NUM_SUPPRESSED)
        start = 0
        while start < num_suppressed:
            there = start + lane < num_suppressed
            token = tl.load(suppressed_ids + start + lane, mask=there, other=0)
            tl.store(row + token, tl.full([BLOCK], float("-inf"), tl.float32), mask=there)
            start += BLOCK
    tl.debug_barrier()
