"""Sampling on CPU: one call draws all tokens of a step; parallel over draws, no Python per row.

A draw makes one pass over its logits for group maxima, one for weights if top_p asks for them, and
one for noise. Logarithms are taken only for tokens that can still win: a token with score
x + G > best needs a uniform below exp(x - best), and that bound is compared with the high word of
the uniform by integer arithmetic (README.md has the derivation).

Exactness level *bits*: a draw depends on its own row and slot only. Twin: naive.py.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, njit, prange, types

from batchwright.kernels import get_num_threads
from batchwright.kernels.arguments import argument_reader
from batchwright.kernels.parallel import Task, compile_task, own, read_only, run_tasks
from batchwright.kernels.sample.adjust import adjust, is_adjusted
from batchwright.kernels.sample.draw import draw
from batchwright.kernels.sample.filters import NUM_BINS, top_k_cut, top_p_cut
from batchwright.kernels.sample.layout import SLOT
from batchwright.kernels.sample.rowmath import (
    GROUP,
    MINUS_INF_KEY,
    first_maximum,
    group_maxima,
    is_sound,
    num_groups,
)
from batchwright.request import Int32Array

MAXIMA, COUNTS = 2, 3  # lines of Scratch.ints; 0 and 1 are lists of candidates


def argmax_rows(logits: Any, row_of_sample: Int32Array) -> Int32Array:
    """Greedy tokens: the lowest id among the largest logits; -1 for a row that is not sound.

    Args:
        logits: [num_rows, vocab_size] float32, C-contiguous.
        row_of_sample: [num_samples] int32.
    """
    out = np.empty(len(row_of_sample), np.int32)
    maxima = np.empty((get_num_threads(), num_groups(logits.shape[1])), np.int32)
    _argmax_rows(read_only(logits), own(row_of_sample, np.int32), maxima, out)
    return out


def sample_rows(
    logits: Any,
    row_of_sample: Int32Array,
    slot_of_sample: Int32Array,
    output_positions: Int32Array,
    slots: Any,
    bias_ids: Int32Array,
    bias_values: Any,
    suppressed_ids: Int32Array,
    history: Int32Array,
    allowed: Any,
    mask_of_sample: Int32Array,
    scratch: Scratch,
) -> Int32Array:
    """Draw one token per sample; -1 where the row is not sound or nothing may be drawn.

    Args:
        logits: [num_rows, vocab_size] float32, C-contiguous; not changed.
        row_of_sample, slot_of_sample, output_positions: [num_samples] int32.
        slots: [max_num_seqs] layout.SLOT.
        bias_ids, bias_values: [max_num_seqs, any] int32 and float32.
        suppressed_ids: [max_num_seqs, any] int32.
        history: [max_num_seqs, any] int32, the tokens so far of slots with penalties.
        allowed: [num_masks, at least ceil(vocab_size / 32)] uint32, bit v % 32 of word v // 32 set
            if v may be drawn.
        mask_of_sample: [num_samples] int32, a line of `allowed`, or -1 for no restriction.
        scratch: from `make_scratch`.
    """
    out = np.empty(len(row_of_sample), np.int32)
    run_tasks(
        _worker(),
        min(get_num_threads(), len(scratch.words), max(len(out), 1)),
        read_only(logits),
        own(row_of_sample, np.int32),
        own(slot_of_sample, np.int32),
        own(output_positions, np.int32),
        slots,
        bias_ids,
        bias_values,
        suppressed_ids,
        history,
        own(allowed, np.uint32),
        own(mask_of_sample, np.int32),
        *scratch,
        out,
    )
    return out


class Scratch(NamedTuple):
    """Working memory of `sample_rows`, a line per thread; touched only as far as draws need it."""

    floats: Any  # [num_threads, 3, width] float32
    ints: Any  # [num_threads, 4, width] int32
    doubles: Any  # [num_threads, NUM_BINS + 1] float64
    words: Any  # [num_threads, GROUP // 2] uint64
    halves: Any  # words as uint32


def make_scratch(num_threads: int, vocab_size: int) -> Scratch:
    """Scratch for rows of `vocab_size` logits."""
    width = num_groups(vocab_size) * GROUP
    ints = np.empty((num_threads, 4, width), np.int32)
    ints[:, COUNTS] = 0  # every draw leaves the token counts at zero
    words = np.empty((num_threads, GROUP // 2), np.uint64)
    return Scratch(
        floats=np.empty((num_threads, 3, width), np.float32),
        ints=ints,
        doubles=np.empty((num_threads, NUM_BINS + 1), np.float64),
        words=words,
        halves=words.view(np.uint32),
    )


@njit(parallel=True, cache=True, error_model="numpy")
def _argmax_rows(logits, row_of_sample, maxima, out):  # type: ignore[no-untyped-def]
    num_tasks = len(maxima)
    for task in prange(num_tasks):
        for i in range(task, len(out), num_tasks):
            row = logits[row_of_sample[i]]
            largest, smallest = group_maxima(row, maxima[task])
            out[i] = -1
            if is_sound(largest, smallest):
                out[i] = first_maximum(row, maxima[task], largest)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")
def _sample(  # type: ignore[no-untyped-def]
    task,
    num_tasks,
    logits,
    row_of_sample,
    slot_of_sample,
    positions,
    slots,
    bias_ids,
    bias_values,
    suppressed_ids,
    history,
    allowed,
    mask_of_sample,
    floats,
    ints,
    doubles,
    words,
    halves,
    out,
):
    """Draws task, task + num_tasks, ...; see sample_rows."""
    for i in range(task, len(out), num_tasks):
        index = slot_of_sample[i]
        slot = slots[index]
        row = logits[row_of_sample[i]]
        mask = mask_of_sample[i]
        if mask >= 0 or is_adjusted(slot, positions[i]):
            adjust(
                row,
                slot,
                positions[i],
                bias_ids[index],
                bias_values[index],
                suppressed_ids[index],
                history[index],
                allowed[mask] if mask >= 0 else allowed[0, :0],
                ints[task, COUNTS],
                floats[task, 0],
            )
            row = floats[task, 0, : len(row)]
        maxima = ints[task, MAXIMA]
        largest, smallest = group_maxima(row, maxima)
        if not is_sound(largest, smallest):
            out[i] = -1
            continue
        first = first_maximum(row, maxima, largest)
        if slot.temperature == 0.0:
            out[i] = first
            continue
        groups = (len(row) + GROUP - 1) // GROUP
        cut_key, cut_id = MINUS_INF_KEY, len(row)
        if 0 < slot.top_k < len(row):
            cut_key = top_k_cut(
                row,
                maxima,
                groups,
                row[first],
                slot.top_k,
                floats[task, 1],
                ints[task, 0],
                ints[task, 1],
                floats[task, 2],
                doubles[task],
            )
        if slot.top_p < 1.0:
            cut_key, cut_id = top_p_cut(
                row,
                maxima,
                groups,
                row[first],
                slot.temperature,
                slot.top_p,
                cut_key,
                floats[task, 1],
                ints[task, 0],
                ints[task, 1],
                floats[task, 2],
                doubles[task],
            )
        out[i] = draw(
            row,
            maxima,
            groups,
            slot,
            positions[i],
            cut_key,
            cut_id,
            first,
            words[task],
            halves[task],
        )


_read = argument_reader(
    types.Array(types.float32, 2, "C", readonly=True),
    types.int32[::1],
    types.int32[::1],
    types.int32[::1],
    from_dtype(SLOT)[::1],
    types.int32[:, ::1],
    types.float32[:, ::1],
    types.int32[:, ::1],
    types.int32[:, ::1],
    types.uint32[:, ::1],
    types.int32[::1],
    types.float32[:, :, ::1],
    types.int32[:, :, ::1],
    types.float64[:, ::1],
    types.uint64[:, ::1],
    types.uint32[:, ::1],
    types.int32[::1],
)


def _sample_task(task: int, num_tasks: int, at: int) -> None:
    _sample(task, num_tasks, *_read(at))


@functools.cache
def _worker() -> Task:
    return compile_task(_sample_task)
