"""Sampling on a GPU: one token per sample from rows of logits, by the definition in README.md.

Given the same fp32 logits it draws the tokens of numba.py: the noise, the order of steps and the
exact sums of weights are the same. What differs is the last bit of fp64 logarithms, which decides
only between tokens whose scores are equal to 1e-14, and that scores of plain rows are compared as
differences and never formed.

A program draws one row. Greedy rows, and rows with nothing but a temperature (and a mask), are read
once. For filtered rows, the largest logit of every lane bounds the k-th largest of the row, so that
a second pass can list the few tokens that matter, and the cuts are found by bisection in that list.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from batchwright.errors import ShapeError
from batchwright.kernels.sample import rowmath
from batchwright.kernels.sample.layout import SLOT
from batchwright.kernels.sample.triton_adjust import (
    MIN_P,
    NOISE_KEY,
    NUM_TOKENS,
    SAMPLE_INDEX,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WORDS,
    adjust,
    is_adjusted_slot,
    is_filtered_slot,
)
from batchwright.kernels.sample.triton_row import filtered, greedy, plain

BLOCK = 2048
"""Tokens that a program looks at at once."""

MAX_PROGRAMS = 264
"""Programs that draw filtered or adjusted rows: two for each multiprocessor of an H100."""


class Scratch(NamedTuple):
    """Working memory of `sample_rows`, a line per program; only as far as draws need it is used."""

    rows: torch.Tensor  # [num_programs, vocab_size] fp32, adjusted logits
    counts: torch.Tensor  # [num_programs, vocab_size] int32, all zero between calls
    list_logits: torch.Tensor  # [num_programs, vocab_size] fp32
    list_tokens: torch.Tensor  # [num_programs, vocab_size] int32


def make_scratch(num_samples: int, vocab_size: int, device: torch.device | str) -> Scratch:
    """Scratch for calls with up to `num_samples` samples; 16 bytes for each token of a line."""
    shape = (min(num_samples, MAX_PROGRAMS), vocab_size)
    return Scratch(
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.zeros(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )


def sample_rows(
    logits: torch.Tensor,
    row_of_sample: torch.Tensor,
    slot_of_sample: torch.Tensor,
    output_positions: torch.Tensor,
    slots: torch.Tensor,
    *,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    suppressed_ids: torch.Tensor,
    history: torch.Tensor,
    allowed: torch.Tensor | None = None,
    mask_of_sample: torch.Tensor | None = None,
    scratch: Scratch | None = None,
    out: torch.Tensor | None = None,
    block: int = BLOCK,
) -> torch.Tensor:
    """Draw one token per sample; -1 where the row is not sound or nothing may be drawn.

    Args:
        logits: [num_rows, vocab_size] fp32, fp16 or bf16; rows may be strided; not changed.
        row_of_sample, slot_of_sample, output_positions: [num_samples] int32. Row -1: nothing is
            drawn and -1 is written (a captured graph runs with unused samples).
        slots: [max_num_seqs, SLOT.itemsize] uint8, the bytes of an array of layout.SLOT.
        bias_ids, bias_values: [max_num_seqs, any] int32 and fp32.
        suppressed_ids: [max_num_seqs, any] int32.
        history: [max_num_seqs, any] int32, the tokens so far of slots with penalties.
        allowed: [num_masks, at least ceil(vocab_size / 32)] int32 (the bits of uint32), bit v % 32
            of word v // 32 set if v may be drawn.
        mask_of_sample: [num_samples] int32, a line of `allowed`, or -1 for no restriction. Given
            with `allowed` and only with it.
        scratch: from `make_scratch`. None promises that no slot drawn has filters, bias, penalties
            or tokens to suppress: these are then ignored.
        out: [num_samples] int32, written; None: allocated.
        block: tokens a program looks at at once, a power of two.
    Raises:
        ShapeError: tensors that disagree in shape or dtype.

    Nothing is read back, so it may be captured in a CUDA graph. Level *bits*: a draw depends on its
    row, its slot and the noise of (key, sample index, output position), and on nothing else.
    """
    num_samples = len(row_of_sample)
    out = torch.empty_like(row_of_sample) if out is None else out
    _check(logits, row_of_sample, slot_of_sample, output_positions, slots, allowed, mask_of_sample,
           scratch, out)  # fmt: skip
    if num_samples == 0:
        return out
    vocab_size = logits.shape[1]
    common = (
        logits, row_of_sample, slot_of_sample, output_positions, slots.view(torch.int64),
        slots.view(torch.float64), slots.view(torch.int32), slots.view(torch.float32), allowed,
        mask_of_sample, out, logits.stride(0), 0 if allowed is None else allowed.stride(0),
    )  # fmt: skip
    block = min(block, max(16, triton.next_power_of_2(vocab_size)))
    options: dict[str, Any] = {
        "VOCAB_SIZE": vocab_size,
        "MASKED": allowed is not None,
        "BLOCK": block,
        "num_warps": 8 if block > 1024 else 4,
        # weights must have the bits of rowmath.py, which rounds products before adding
        "enable_fp_fusion": False,
    }
    _draw_plain[(num_samples,)](*common, SPECIAL=scratch is not None, **options)
    if scratch is not None:
        _draw_special[(min(num_samples, len(scratch.rows)),)](
            *common, num_samples, bias_ids, bias_values, suppressed_ids, history, *scratch,
            bias_ids.stride(0), suppressed_ids.stride(0), history.stride(0), **options,
        )  # fmt: skip
    return out


def append_tokens(
    slots: torch.Tensor,
    history: torch.Tensor,
    slot_of_sample: torch.Tensor,
    token_ids: torch.Tensor,
) -> None:
    """Add drawn tokens to the history of slots that keep one (num_tokens > 0), on the device.

    Args:
        slots: [max_num_seqs, SLOT.itemsize] uint8; num_tokens is counted up.
        history: [max_num_seqs, any] int32, written.
        slot_of_sample: [num_samples] int32, distinct.
        token_ids: [num_samples] int32; -1 is kept and ignored, as SamplingState.append does.
    """
    if len(token_ids):
        _append[(triton.cdiv(len(token_ids), 128),)](
            slots.view(torch.int32), history, slot_of_sample, token_ids, len(token_ids),
            history.stride(0), history.shape[1], BLOCK=128,
        )  # fmt: skip


def _check(
    logits: torch.Tensor,
    row_of_sample: torch.Tensor,
    slot_of_sample: torch.Tensor,
    output_positions: torch.Tensor,
    slots: torch.Tensor,
    allowed: torch.Tensor | None,
    mask_of_sample: torch.Tensor | None,
    scratch: Scratch | None,
    out: torch.Tensor,
) -> None:
    num_samples, vocab_size = len(row_of_sample), logits.shape[1]
    index = [row_of_sample, slot_of_sample, output_positions, out]
    if mask_of_sample is not None:
        index.append(mask_of_sample)
    if any(x.dtype != torch.int32 or x.shape != (num_samples,) for x in index):
        raise ShapeError(f"sample_rows: indices must be [{num_samples}] int32 tensors")
    if slots.dtype != torch.uint8 or slots.shape[1:] != (SLOT.itemsize,):
        raise ShapeError(
            f"sample_rows: slots are {slots.dtype} {tuple(slots.shape)}, not uint8 "
            f"[max_num_seqs, {SLOT.itemsize}]"
        )
    if logits.stride(1) != 1 or not slots.is_contiguous():
        raise ShapeError("sample_rows: rows of logits and slots must be contiguous")
    if not 0 < vocab_size <= rowmath.MAX_VOCAB_SIZE:
        raise ShapeError(f"sample_rows: vocab_size {vocab_size} is not 1 to {2**19}")
    if (allowed is None) != (mask_of_sample is None):
        raise ShapeError("sample_rows: allowed and mask_of_sample belong together")
    if allowed is not None and (
        allowed.dtype != torch.int32 or allowed.shape[1] * 32 < vocab_size or allowed.stride(1) != 1
    ):
        raise ShapeError(
            f"sample_rows: allowed is {allowed.dtype} {tuple(allowed.shape)}, not int32 words of "
            f"{vocab_size} bits"
        )
    if scratch is not None and scratch.rows.shape[1] < vocab_size:
        raise ShapeError(
            f"sample_rows: scratch for {scratch.rows.shape[1]} tokens, logits of {vocab_size}"
        )


@triton.jit
def _draw_plain(
    logits: tl.tensor,
    row_of_sample: tl.tensor,
    slot_of_sample: tl.tensor,
    output_positions: tl.tensor,
    slots_i64: tl.tensor,
    slots_f64: tl.tensor,
    slots_i32: tl.tensor,
    slots_f32: tl.tensor,
    allowed: tl.tensor,
    mask_of_sample: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    mask_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    SPECIAL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Samples that read their row once: greedy, or a temperature alone."""
    i = tl.program_id(0)
    line = tl.load(row_of_sample + i)
    slot = tl.load(slot_of_sample + i).to(tl.int64)
    position = tl.load(output_positions + i)
    slot_i32 = slots_i32 + slot * WORDS
    slot_f64 = slots_f64 + slot * (WORDS // 2)
    if line < 0:
        tl.store(out + i, -1)
        return
    if SPECIAL:
        special = is_adjusted_slot(slot_i32, position) | is_filtered_slot(
            slot_i32, slot_f64, VOCAB_SIZE
        )
        if special:
            return
    row = logits + line.to(tl.int64) * row_stride
    words = allowed
    has_mask = False
    if MASKED:
        mask = tl.load(mask_of_sample + i)
        has_mask = mask >= 0
        words = allowed + tl.maximum(mask, 0).to(tl.int64) * mask_stride
    temperature = tl.load(slot_f64 + TEMPERATURE)
    if temperature == 0.0:
        token = greedy(row, row, False, words, has_mask, VOCAB_SIZE, MASKED, False, BLOCK)
    else:
        token = plain(
            row, row, False, words, has_mask, VOCAB_SIZE, temperature, position,
            tl.load(slot_i32 + SAMPLE_INDEX),
            tl.load(slots_i64 + slot * (WORDS // 2) + NOISE_KEY), MASKED, False, BLOCK,
        )  # fmt: skip
    tl.store(out + i, token)


@triton.jit(do_not_specialize=["num_samples"])
def _draw_special(
    logits: tl.tensor,
    row_of_sample: tl.tensor,
    slot_of_sample: tl.tensor,
    output_positions: tl.tensor,
    slots_i64: tl.tensor,
    slots_f64: tl.tensor,
    slots_i32: tl.tensor,
    slots_f32: tl.tensor,
    allowed: tl.tensor,
    mask_of_sample: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    mask_stride: tl.tensor,
    num_samples: tl.tensor,
    bias_ids: tl.tensor,
    bias_values: tl.tensor,
    suppressed_ids: tl.tensor,
    history: tl.tensor,
    rows: tl.tensor,
    counts: tl.tensor,
    list_logits: tl.tensor,
    list_tokens: tl.tensor,
    bias_stride: tl.tensor,
    suppressed_stride: tl.tensor,
    history_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Samples with filters or adjusted logits; a program takes every so-manieth sample."""
    scratch_line = tl.program_id(0).to(tl.int64) * VOCAB_SIZE
    i = tl.program_id(0)
    while i < num_samples:
        line = tl.load(row_of_sample + i)
        slot = tl.load(slot_of_sample + i).to(tl.int64)
        position = tl.load(output_positions + i)
        slot_i32 = slots_i32 + slot * WORDS
        slot_f64 = slots_f64 + slot * (WORDS // 2)
        is_adjusted = is_adjusted_slot(slot_i32, position)
        is_filtered = is_filtered_slot(slot_i32, slot_f64, VOCAB_SIZE)
        if (line >= 0) & (is_adjusted | is_filtered):
            raw = logits + line.to(tl.int64) * row_stride
            row = rows + scratch_line
            if is_adjusted:
                adjust(
                    raw, row, counts + scratch_line, VOCAB_SIZE, slot_i32,
                    slots_f32 + slot * WORDS, position, bias_ids + slot * bias_stride,
                    bias_values + slot * bias_stride, suppressed_ids + slot * suppressed_stride,
                    history + slot * history_stride, BLOCK,
                )  # fmt: skip
            words = allowed
            has_mask = False
            if MASKED:
                mask = tl.load(mask_of_sample + i)
                has_mask = mask >= 0
                words = allowed + tl.maximum(mask, 0).to(tl.int64) * mask_stride
            temperature = tl.load(slot_f64 + TEMPERATURE)
            sample = tl.load(slot_i32 + SAMPLE_INDEX)
            key = tl.load(slots_i64 + slot * (WORDS // 2) + NOISE_KEY)
            if temperature == 0.0:
                token = greedy(raw, row, is_adjusted, words, has_mask, VOCAB_SIZE, MASKED, True,
                                BLOCK)  # fmt: skip
            elif is_filtered:
                token = filtered(
                    raw, row, is_adjusted, words, has_mask, VOCAB_SIZE, temperature,
                    tl.load(slot_i32 + TOP_K), tl.load(slot_f64 + TOP_P),
                    tl.load(slot_f64 + MIN_P), position, sample, key, list_logits + scratch_line,
                    list_tokens + scratch_line, MASKED, BLOCK,
                )  # fmt: skip
            else:
                token = plain(raw, row, is_adjusted, words, has_mask, VOCAB_SIZE, temperature,
                               position, sample, key, MASKED, True, BLOCK)  # fmt: skip
            tl.store(out + i, token)
        i += tl.num_programs(0)


@triton.jit(do_not_specialize=["num_samples"])
def _append(
    slots_i32: tl.tensor,
    history: tl.tensor,
    slot_of_sample: tl.tensor,
    token_ids: tl.tensor,
    num_samples: tl.tensor,
    history_stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < num_samples
    slot = tl.load(slot_of_sample + i, mask=there, other=0).to(tl.int64)
    place = slots_i32 + slot * WORDS + NUM_TOKENS
    num_tokens = tl.load(place, mask=there, other=0)
    keeps = there & (num_tokens > 0) & (num_tokens < width)
    tl.store(
        history + slot * history_stride + num_tokens, tl.load(token_ids + i, mask=there), mask=keeps
    )
    tl.store(place, num_tokens + 1, mask=keeps)
