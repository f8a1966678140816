"""What changes a row before temperature and filters: bias, penalties, suppressed tokens. Numba."""

from __future__ import annotations

import numpy as np

from batchwright.kernels.sample.rowmath import inner

_F32 = np.float32
_I32 = np.int32
_MINUS_INF = np.float32(-np.inf)
_PROMPT = np.int32(1 << 30)
_ALL_BITS = np.uint32(0xFFFFFFFF)


@inner
def is_adjusted(slot, position):  # type: ignore[no-untyped-def]
    """The slot changes logits before temperature and filters."""
    return (
        slot.num_tokens > 0
        or slot.num_biased > 0
        or (slot.num_suppressed > 0 and position < slot.min_tokens)
    )


@inner
def _penalize(row, slot, history, counts):  # type: ignore[no-untyped-def]
    """Repetition, then frequency, then presence penalty; counts is all zero before and after."""
    size = len(row)
    start = 0 if slot.repetition_penalty != _F32(1.0) else slot.num_prompt_tokens
    for i in range(start, slot.num_tokens):
        token = history[i]
        if 0 <= token < size:
            if i < slot.num_prompt_tokens:
                counts[token] |= _PROMPT
            else:
                counts[token] += _I32(1)
    for i in range(start, slot.num_tokens):
        token = history[i]
        if not 0 <= token < size or counts[token] == 0:
            continue
        count = counts[token] & _I32(_PROMPT - 1)
        counts[token] = 0
        value = row[token]
        if slot.repetition_penalty != _F32(1.0):
            if value > 0:
                value = value / slot.repetition_penalty
            else:
                value = value * slot.repetition_penalty
        if count > 0:
            value = value - slot.frequency_penalty * _F32(count)
            value = value - slot.presence_penalty
        row[token] = value


@inner
def adjust(  # type: ignore[no-untyped-def]
    logits, slot, position, bias_ids, bias_values, suppressed_ids, history, allowed, counts, row
):
    """logits into row, then bias, penalties, min_tokens and the allowed set, in that order."""
    size = len(logits)
    for i in range(size):
        row[i] = logits[i]
    for i in range(slot.num_biased):
        row[bias_ids[i]] += bias_values[i]
    if slot.num_tokens > 0:
        _penalize(row, slot, history, counts)
    if position < slot.min_tokens:
        for i in range(slot.num_suppressed):
            row[suppressed_ids[i]] = _MINUS_INF
    for word in range((size + 31) // 32 if len(allowed) > 0 else 0):
        bits = allowed[word]
        if bits == _ALL_BITS:
            continue
        start = word * 32
        for i in range(min(32, size - start)):
            if (bits >> np.uint32(i)) & np.uint32(1) == 0:
                row[start + i] = _MINUS_INF
