"""Random sampling problems, drawn by the fast kernel and by its naive twin."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchwright.kernels.sample import naive
from batchwright.kernels.sample.layout import SLOT
from batchwright.kernels.sample.numba import COUNTS, Scratch, make_scratch, sample_rows

KINDS = ("normal", "peaked", "ties", "constant", "zipf", "masked", "huge")


def make_rows(kind: str, num_rows: int, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """[num_rows, vocab_size] float32 logits of one kind."""
    x = rng.standard_normal((num_rows, vocab_size))
    if kind == "peaked":  # one token holds nearly everything
        x[np.arange(num_rows), rng.integers(0, vocab_size, num_rows)] += 20
    elif kind == "ties":  # few distinct values, as from bf16; both zeros
        x = np.round(2 * x) / 2
        x[x == 0] *= rng.choice([-1.0, 1.0])
    elif kind == "constant":
        x[:] = 3.0
    elif kind == "zipf":
        x = 0.3 * x - 1.2 * np.log(rng.permutation(vocab_size) + 5.0)
    elif kind == "masked":  # as after a grammar: most are impossible
        x[rng.random(x.shape) < 0.9] = -np.inf
        x[:, vocab_size // 2] = 0.0
    elif kind == "huge":
        x *= 1e4
    return np.ascontiguousarray(x, np.float32)


def make_slots(num_slots: int, rng: np.random.Generator, **fields: Any) -> np.ndarray:
    """Slots that ask for nothing special, with random noise keys; then `fields`."""
    slots = np.zeros(num_slots, SLOT)
    slots["temperature"] = slots["top_p"] = slots["repetition_penalty"] = 1
    slots["noise_key"] = rng.integers(0, 2**64, num_slots, np.uint64)
    slots["sample_index"] = rng.integers(0, 8, num_slots)
    for name, value in fields.items():
        slots[name] = value
    return slots


def mixed_slots(num_slots: int, rng: np.random.Generator) -> np.ndarray:
    """Slots with random temperature and filters, each often off."""
    return make_slots(
        num_slots,
        rng,
        temperature=rng.choice([0, 1e-8, 0.1, 0.7, 1, 2, 50], num_slots),
        top_k=rng.choice([0, 0, 1, 2, 50, 700, 3000], num_slots),
        top_p=rng.choice([1, 1, 0, 0.1, 0.5, 0.9, 0.99, 0.9999999], num_slots),
        min_p=rng.choice([0, 0, 0.05, 0.5, 1], num_slots),
    )


def poisoned_scratch(num_threads: int, vocab_size: int) -> Scratch:
    """Scratch full of NaN and nonsense, so that nothing is read that was not written."""
    scratch = make_scratch(num_threads, vocab_size)
    scratch.floats.fill(np.nan)
    scratch.doubles.fill(np.nan)
    scratch.words.fill(2**64 - 1)
    scratch.ints[:, :COUNTS].fill(2**31 - 1)
    return scratch


def draw_fast(
    logits: np.ndarray,
    slots: np.ndarray,
    positions: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    scratch: Scratch | None = None,
    **tables: Any,
) -> np.ndarray:
    """One draw per slot. tables: bias_ids, bias_values, suppressed_ids, history, allowed,
    mask_of_sample (by default the lines of allowed, if there is one)."""
    num = len(slots)
    own_rows = np.arange(num, dtype=np.int32)
    lines = own_rows if "allowed" in tables else np.full_like(own_rows, -1)
    return sample_rows(
        logits,
        own_rows if rows is None else rows,
        own_rows,
        positions,
        slots,
        tables.get("bias_ids", np.zeros((num, 1), np.int32)),
        tables.get("bias_values", np.zeros((num, 1), np.float32)),
        tables.get("suppressed_ids", np.zeros((num, 1), np.int32)),
        tables.get("history", np.zeros((num, 1), np.int32)),
        tables.get("allowed", np.empty((1, 0), np.uint32)),
        tables.get("mask_of_sample", lines),
        poisoned_scratch(2, logits.shape[1]) if scratch is None else scratch,
    )


def draw_naive(logits: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The same without tables."""
    return np.array(
        [
            naive.draw_token(
                row,
                temperature=float(slot["temperature"]),
                top_k=int(slot["top_k"]),
                top_p=float(slot["top_p"]),
                min_p=float(slot["min_p"]),
                noise_key=int(slot["noise_key"]),
                sample_index=int(slot["sample_index"]),
                output_position=int(position),
            )
            for row, slot, position in zip(logits, slots, positions)
        ],
        np.int32,
    )
