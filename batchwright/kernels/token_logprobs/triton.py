"""Log-probabilities of given tokens on a GPU, with rank and likeliest rivals. Twin: naive.py.

One program takes one row. A first pass sums exponentials with a running maximum in every lane and
counts larger logits. The k-th largest maximum of a lane is a lower bound of the k-th largest logit,
so a second pass lists few tokens, from which the rivals are taken one by one. A row whose k-th
largest logit ties with many others has a long list: right, and slow.

Exponentials and their sums in a lane are fp32, sums over lanes fp64. Exactness level *bits*: a line
depends on its own row only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from batchwright.errors import ShapeError
from batchwright.kernels.sample.triton_filters import kth_largest

BLOCK = 2048
"""Tokens that a program looks at at once, and the most rivals of a row."""

MAX_PROGRAMS = 264


class LogprobTensors(NamedTuple):
    """What step.TokenLogprobs holds, on the device."""

    logprobs: torch.Tensor  # [num] fp32
    ranks: torch.Tensor  # [num] int32
    top_ids: torch.Tensor  # [num, max_top] int32
    top_logprobs: torch.Tensor  # [num, max_top] fp32


def logprob_rows(
    logits: torch.Tensor,
    row_of_token: torch.Tensor,
    token_ids: torch.Tensor,
    num_top: torch.Tensor,
    *,
    max_top: int,
    scratch: tuple[torch.Tensor, torch.Tensor] | None = None,
    block: int = BLOCK,
) -> LogprobTensors:
    """Log-softmax of rows at their tokens, the tokens' ranks, and the likeliest tokens.

    Args:
        logits: [num_rows, vocab_size] fp32, fp16 or bf16, raw; rows may be strided.
        row_of_token: [num] int32; -1 for an unused line.
        token_ids: [num] int32; -1 for none.
        num_top: [num] int32, rivals wanted, at most max_top; -1: this line is not wanted.
        max_top: width of the result, at most `block` and vocab_size.
        scratch: list_logits and list_tokens of sample.triton.Scratch, [lines, >= vocab_size] fp32
            and int32; None: allocated.
        block: tokens a program looks at at once, a power of two.
    Returns:
        LogprobTensors. Lines not wanted, unused, with token -1 or an unsound row hold NaN, rank 0
        and ids -1, as places beyond a line's num_top do.
    Raises:
        ShapeError: shapes or dtypes disagree, or max_top is too large.
    """
    num, vocab_size = len(token_ids), logits.shape[1]
    if any(x.dtype != torch.int32 or x.shape != (num,) for x in (row_of_token, token_ids, num_top)):
        raise ShapeError(f"logprob_rows: indices must be [{num}] int32 tensors")
    if logits.stride(1) != 1:
        raise ShapeError("logprob_rows: rows of logits must be contiguous")
    block = min(block, max(16, triton.next_power_of_2(vocab_size)))
    if not 0 <= max_top <= min(block, vocab_size):
        raise ShapeError(f"logprob_rows: max_top {max_top} is not 0 to {min(block, vocab_size)}")
    device = logits.device
    lines = LogprobTensors(
        torch.empty(num, dtype=torch.float32, device=device),
        torch.empty(num, dtype=torch.int32, device=device),
        torch.empty((num, max_top), dtype=torch.int32, device=device),
        torch.empty((num, max_top), dtype=torch.float32, device=device),
    )
    if num == 0:
        return lines
    if scratch is None:
        shape = (min(num, MAX_PROGRAMS), vocab_size if max_top else 1)
        scratch = (
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
        )
    _logprobs[(min(num, len(scratch[0])),)](
        logits, row_of_token, token_ids, num_top, *lines, *scratch, num, logits.stride(0),
        scratch[0].stride(0), VOCAB_SIZE=vocab_size, MAX_TOP=max_top, BLOCK=block,
        num_warps=8 if block > 1024 else 4,
    )  # fmt: skip
    return lines


@triton.jit(do_not_specialize=["num"])
def _logprobs(
    logits: tl.tensor,
    row_of_token: tl.tensor,
    token_ids: tl.tensor,
    num_top: tl.tensor,
    logprobs: tl.tensor,
    ranks: tl.tensor,
    top_ids: tl.tensor,
    top_logprobs: tl.tensor,
    list_logits: tl.tensor,
    list_tokens: tl.tensor,
    num: tl.tensor,
    row_stride: tl.tensor,
    scratch_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    MAX_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    list_logits += tl.program_id(0).to(tl.int64) * scratch_stride
    list_tokens += tl.program_id(0).to(tl.int64) * scratch_stride
    lane = tl.arange(0, BLOCK)
    i = tl.program_id(0)
    while i < num:
        line = tl.load(row_of_token + i)
        token = tl.load(token_ids + i)
        wanted = tl.load(num_top + i)
        tl.store(logprobs + i, float("nan"))
        tl.store(ranks + i, 0)
        if MAX_TOP > 0:
            tl.store(top_ids + i * MAX_TOP + lane, -1, mask=lane < MAX_TOP)
            tl.store(top_logprobs + i * MAX_TOP + lane, float("nan"), mask=lane < MAX_TOP)
        if (line >= 0) & (token >= 0) & (wanted >= 0):
            row = logits + line.to(tl.int64) * row_stride
            own = tl.load(row + token).to(tl.float32)
            maxima = tl.full([BLOCK], float("-inf"), tl.float32)
            sums = tl.zeros([BLOCK], tl.float32)
            larger = tl.zeros([BLOCK], tl.int32)
            bad = tl.zeros([BLOCK], tl.int32)
            for start in range(0, VOCAB_SIZE, BLOCK):
                x = tl.load(row + start + lane, mask=start + lane < VOCAB_SIZE, other=float("-inf"))
                x = x.to(tl.float32)
                bad = tl.where(x < float("inf"), bad, 1)
                larger += (x > own).to(tl.int32)
                after = tl.where(x > maxima, x, maxima)
                shift = tl.where(after > float("-inf"), after, 0.0)
                sums = sums * tl.exp(maxima - shift) + tl.exp(x - shift)
                maxima = after
            top = tl.max(maxima, 0)
            if (tl.max(bad, 0) == 0) & (top > float("-inf")):
                total = tl.sum((sums * tl.exp(maxima - top)).to(tl.float64), 0)
                log_total = tl.log(total)
                logprob = (own.to(tl.float64) - top.to(tl.float64)) - log_total
                tl.store(logprobs + i, logprob.to(tl.float32))
                tl.store(ranks + i, tl.sum(larger, 0) + 1)
                if (MAX_TOP > 0) & (wanted > 0):
                    bound = kth_largest(maxima, tl.minimum(wanted, MAX_TOP))
                    size = tl.zeros([], tl.int32)
                    tl.debug_barrier()  # an earlier list may still be read
                    for start in range(0, VOCAB_SIZE, BLOCK):
                        inside = start + lane < VOCAB_SIZE
                        x = tl.load(row + start + lane, mask=inside, other=float("-inf"))
                        x = x.to(tl.float32)
                        listed = inside & (x >= bound)
                        at = size + tl.cumsum(listed.to(tl.int32), 0) - 1
                        tl.store(list_logits + at, x, mask=listed)
                        tl.store(list_tokens + at, start + lane, mask=listed)
                        size += tl.sum(listed.to(tl.int32), 0)
                    tl.debug_barrier()
                    last = tl.full([], float("inf"), tl.float32)
                    last_token = tl.full([], -1, tl.int32)
                    rank = 0
                    while rank < tl.minimum(wanted, MAX_TOP):
                        best = tl.full([], float("-inf"), tl.float32)
                        best_token = tl.full([], 2147483647, tl.int32)
                        start = 0
                        while start < size:
                            there = start + lane < size
                            x = tl.load(list_logits + start + lane, mask=there, other=float("-inf"))
                            name = tl.load(list_tokens + start + lane, mask=there, other=2147483647)
                            after_last = (x < last) | ((x == last) & (name > last_token))
                            x = tl.where(there & after_last, x, float("-inf"))
                            name = tl.where(there & after_last, name, 2147483647)
                            largest = tl.max(x, 0)
                            first = tl.min(tl.where(x == largest, name, 2147483647), 0)
                            earlier = (largest == best) & (first < best_token)
                            better = (largest > best) | earlier
                            best = tl.where(better, largest, best)
                            best_token = tl.where(better, first, best_token)
                            start += BLOCK
                        rival = (best.to(tl.float64) - top.to(tl.float64)) - log_total
                        tl.store(top_ids + i * MAX_TOP + rank, best_token)
                        tl.store(top_logprobs + i * MAX_TOP + rank, rival.to(tl.float32))
                        last = best
                        last_token = best_token
                        rank += 1
        i += tl.num_programs(0)
