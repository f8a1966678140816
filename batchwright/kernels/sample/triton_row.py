"""One row from its logits to its token: greedy, a draw from all of it, or from what filters keep.

Triton; see triton.py, whose kernels call these.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from batchwright.kernels.sample import rowmath
from batchwright.kernels.sample.triton_draw import block_words, consider, token_words
from batchwright.kernels.sample.triton_filters import bisect, kth_largest, last_kept, mass, weight

_WEIGHTLESS = tl.constexpr(-rowmath.WEIGHTLESS)
_LEAST_MASS = tl.constexpr(2.0**-34)
_FIRST_REACH = tl.constexpr(10.0)  # top_p looks at tokens down to 2^-10 of the likeliest first
_ULPS = tl.constexpr(2.0**-22)


@triton.jit
def _reach(octaves: tl.tensor, slope: tl.tensor) -> tl.tensor:
    """How much smaller than another a logit is whose weight is 2^octaves times smaller, fp64."""
    return 1.0 / slope.to(tl.float64) * octaves


@triton.jit
def _load_row(
    logits: tl.tensor,
    adjusted_row: tl.tensor,
    is_adjusted: tl.tensor,
    mask_words: tl.tensor,
    has_mask: tl.tensor,
    start: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    ADJUSTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Logits of tokens [start, start + BLOCK), [BLOCK] fp32; -inf outside and where masked."""
    token = start + tl.arange(0, BLOCK)
    inside = token < VOCAB_SIZE
    if ADJUSTS:
        raw = tl.load(logits + token, mask=inside & (not is_adjusted), other=float("-inf"))
        changed = tl.load(adjusted_row + token, mask=inside & is_adjusted, other=float("-inf"))
        row = tl.where(is_adjusted, changed, raw.to(tl.float32))
    else:
        row = tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32)
    if MASKED:
        words = tl.load(mask_words + token // 32, mask=inside & has_mask, other=-1)
        row = tl.where((words >> (token % 32)) & 1 == 1, row, float("-inf"))
    return row


@triton.jit
def greedy(
    logits: tl.tensor,
    adjusted_row: tl.tensor,
    is_adjusted: tl.tensor,
    mask_words: tl.tensor,
    has_mask: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    ADJUSTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The lowest id among the largest logits; -1 for a row that is not sound."""
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    first = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB_SIZE, BLOCK):
        row = _load_row(logits, adjusted_row, is_adjusted, mask_words, has_mask, start, VOCAB_SIZE,
                        MASKED, ADJUSTS, BLOCK)  # fmt: skip
        bad = tl.where(row < float("inf"), bad, 1)  # NaN or +inf
        first = tl.where(row > largest, start + lane, first)
        largest = tl.where(row > largest, row, largest)
    top = tl.max(largest, 0)
    token = tl.min(tl.where(largest == top, first, 2147483647), 0)
    sound = (tl.max(bad, 0) == 0) & (top > float("-inf"))
    return tl.where(sound, token, -1)


@triton.jit
def plain(
    logits: tl.tensor,
    adjusted_row: tl.tensor,
    is_adjusted: tl.tensor,
    mask_words: tl.tensor,
    has_mask: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    temperature: tl.tensor,
    position: tl.tensor,
    sample: tl.tensor,
    key: tl.tensor,
    MASKED: tl.constexpr,
    ADJUSTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """A draw from the whole row; -1 for a row that is not sound."""
    slope = (1.4426950408889634 / temperature).to(tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    best_logit = tl.zeros([], tl.float32)
    best_noise = tl.zeros([], tl.float64)
    best_token = tl.full([], -1, tl.int32)
    for start in range(0, VOCAB_SIZE, BLOCK):
        row = _load_row(logits, adjusted_row, is_adjusted, mask_words, has_mask, start, VOCAB_SIZE,
                        MASKED, ADJUSTS, BLOCK)  # fmt: skip
        bad = tl.where(row < float("inf"), bad, 1)
        words = block_words(start, position, sample, key, BLOCK)
        best_logit, best_noise, best_token = consider(
            row, start + tl.arange(0, BLOCK), words, row > float("-inf"), best_logit, best_noise,
            best_token, best_logit, best_noise, temperature, slope, position, sample, key, BLOCK,
            False,
        )  # fmt: skip
    return tl.where(tl.max(bad, 0) == 0, best_token, -1)


@triton.jit
def _list_tokens(
    logits: tl.tensor,
    adjusted_row: tl.tensor,
    is_adjusted: tl.tensor,
    mask_words: tl.tensor,
    has_mask: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    floor: tl.tensor,
    top: tl.tensor,
    inverse: tl.tensor,
    list_logits: tl.tensor,
    list_tokens: tl.tensor,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """List the finite logits >= floor, ids ascending: (their number, the whole row's weight)."""
    size = tl.zeros([], tl.int32)
    total = tl.zeros([], tl.float64)
    tl.debug_barrier()  # an earlier list may still be read
    for start in range(0, VOCAB_SIZE, BLOCK):
        row = _load_row(logits, adjusted_row, is_adjusted, mask_words, has_mask, start, VOCAB_SIZE,
                        MASKED, True, BLOCK)  # fmt: skip
        total += tl.sum(weight((row - top) * inverse).to(tl.float64), 0)
        listed = (row >= floor) & (row > float("-inf"))
        at = size + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(list_logits + at, row, mask=listed)
        tl.store(list_tokens + at, start + tl.arange(0, BLOCK), mask=listed)
        size += tl.sum(listed.to(tl.int32), 0)
    tl.debug_barrier()
    return size, total


@triton.jit
def filtered(
    logits: tl.tensor,
    adjusted_row: tl.tensor,
    is_adjusted: tl.tensor,
    mask_words: tl.tensor,
    has_mask: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    position: tl.tensor,
    sample: tl.tensor,
    key: tl.tensor,
    list_logits: tl.tensor,
    list_tokens: tl.tensor,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """A draw from what top_k, top_p and min_p keep; -1 for a row that is not sound."""
    maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB_SIZE, BLOCK):
        row = _load_row(logits, adjusted_row, is_adjusted, mask_words, has_mask, start, VOCAB_SIZE,
                        MASKED, True, BLOCK)  # fmt: skip
        bad = tl.where(row < float("inf"), bad, 1)
        maxima = tl.where(row > maxima, row, maxima)
    top = tl.max(maxima, 0)
    best_token = tl.full([], -1, tl.int32)
    if (tl.max(bad, 0) == 0) & (top > float("-inf")):
        slope = (1.4426950408889634 / temperature).to(tl.float32)
        top_f64 = top.to(tl.float64)
        lowest = tl.log(tl.where(min_p > 0.0, min_p, 1.0))
        lowest = tl.where(min_p > 0.0, lowest, float("-inf"))

        # `hard`: no token below it is kept, or counts. `floor`: what is listed for a start.
        hard = tl.full([], float("-inf"), tl.float32)
        has_top_k = (top_k > 0) & (top_k < VOCAB_SIZE)
        if has_top_k:
            if top_k <= BLOCK:  # k lanes have a maximum that large
                hard = kth_largest(maxima, top_k)
            floor = hard
        else:
            if min_p > 0.0:
                edge = top_f64 + lowest * temperature
                hard = (edge - tl.abs(edge) * _ULPS).to(tl.float32)
            floor = hard
            if top_p < 1.0:
                weightless = top_f64 - _reach(_WEIGHTLESS, slope)
                hard = tl.maximum(hard, weightless.to(tl.float32))
                near = (top_f64 - _reach(_FIRST_REACH, slope)).to(tl.float32)
                floor = tl.maximum(hard, near)
        size, total = _list_tokens(
            logits, adjusted_row, is_adjusted, mask_words, has_mask, VOCAB_SIZE, floor, top, slope,
            list_logits, list_tokens, MASKED, BLOCK,
        )  # fmt: skip

        cut = floor
        last = VOCAB_SIZE
        if has_top_k:
            if size > top_k:
                cut, _ = bisect(list_logits, size, floor, top_k.to(tl.float64), top, slope, BLOCK,
                                True)  # fmt: skip
            total = mass(list_logits, size, cut, top, slope, BLOCK, False)
        if top_p < 1.0:
            target = tl.maximum(top_p * total, _LEAST_MASS)
            listed = total
            if not has_top_k:
                listed = mass(list_logits, size, floor, top, slope, BLOCK, False)
                reach = tl.full([], 2.0 * _FIRST_REACH, tl.float64)
                while (listed < target) & (floor > hard):
                    near = (top_f64 - _reach(reach, slope)).to(tl.float32)
                    floor = tl.maximum(hard, near)
                    reach *= 2.0
                    size, _ = _list_tokens(
                        logits, adjusted_row, is_adjusted, mask_words, has_mask, VOCAB_SIZE, floor,
                        top, slope, list_logits, list_tokens, MASKED, BLOCK,
                    )  # fmt: skip
                    listed = mass(list_logits, size, floor, top, slope, BLOCK, False)
                cut = floor
            if listed >= target:  # else min_p alone cuts
                cut, above = bisect(list_logits, size, cut, target, top, slope, BLOCK, False)
                last = last_kept(list_logits, list_tokens, size, cut, above, target, top, slope,
                                 BLOCK)  # fmt: skip

        best_logit = tl.zeros([], tl.float32)
        best_noise = tl.zeros([], tl.float64)
        start = 0
        while start < size:
            at = start + tl.arange(0, BLOCK)
            row = tl.load(list_logits + at, mask=at < size, other=float("-inf"))
            tokens = tl.load(list_tokens + at, mask=at < size, other=0)
            kept = (row > cut) | ((row == cut) & (tokens <= last) & (at < size))
            words = token_words(tokens, position, sample, key, 0)
            best_logit, best_noise, best_token = consider(
                row, tokens, words, kept, best_logit, best_noise, best_token, top, lowest,
                temperature, slope, position, sample, key, BLOCK, True,
            )  # fmt: skip
            start += BLOCK
    return best_token
