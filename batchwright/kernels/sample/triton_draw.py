"""The Gumbel-max draw for GPUs: exact noise only for tokens that can still win. See README.md.

The numbers are those of sampling/noise.py. A block of tokens is compared with the best token so far
by a bound in fp32; only what passes has its noise computed, in fp64, one token at a time.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from batchwright.sampling import noise

_HIGH = tl.constexpr(noise.HIGH_DOMAIN)
_LOW = tl.constexpr(noise.LOW_DOMAIN)
_LARGEST_UNIFORM = tl.constexpr(noise.LARGEST_UNIFORM)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_SLACK = tl.constexpr(2e-3)  # in log2 units; rounding of the bound is below 1e-4
_SCALE = tl.constexpr(2.0**-32)
_SMALLEST = tl.constexpr(2.0**-65)  # of a uniform


@triton.jit
def block_words(start: tl.tensor, position: tl.tensor, sample: tl.tensor, key: tl.tensor,
                BLOCK: tl.constexpr) -> tl.tensor:  # fmt: skip
    """High words of tokens [start, start + BLOCK), [BLOCK] uint32; start is a multiple of 4."""
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = tl.philox(key, counter, position, sample, _HIGH)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def token_words(token: tl.tensor, position: tl.tensor, sample: tl.tensor, key: tl.tensor,
                DOMAIN: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The word of each of `token` (a scalar or a block) in one domain."""
    w0, w1, w2, w3 = tl.philox(key, token // 4, position, sample, DOMAIN)
    upper = tl.where(token % 2 == 0, w2, w3)
    return tl.where(token % 4 < 2, tl.where(token % 2 == 0, w0, w1), upper)


@triton.jit
def gumbel(token: tl.tensor, position: tl.tensor, sample: tl.tensor, key: tl.tensor) -> tl.tensor:
    """The noise of one token, fp64: -log(-log1p(-u))."""
    high = token_words(token, position, sample, key, _HIGH).to(tl.float64)
    low = token_words(token, position, sample, key, _LOW).to(tl.float64)
    u = (high + (low + 0.5) * _SCALE) * _SCALE
    u = tl.where(u < _LARGEST_UNIFORM, u, tl.full([], _LARGEST_UNIFORM, tl.float64))
    rest = 1.0 - u
    # log1p without libdevice: the rounding of `rest` cancels in u / (1 - rest)
    lost = tl.where(rest == 1.0, 1.0, 1.0 - rest)
    exponential = tl.where(rest == 1.0, u, -tl.log(rest) * (u / lost))
    return -tl.log(exponential)


@triton.jit
def _bound(logits: tl.tensor, words: tl.tensor, kept: tl.tensor, best_logit: tl.tensor,
           best_noise: tl.tensor, best_token: tl.tensor,
           slope: tl.tensor) -> tl.tensor:  # fmt: skip
    """Upper bound of log2(e) * (score - best score); -inf where the token cannot win.

    E = -log1p(-u) is at least u, and u at least words / 2^32, so G <= -log(words / 2^32).
    """
    uniform = tl.maximum(words.to(tl.float32) * _SCALE, _SMALLEST)
    offset = (best_noise * _MINUS_LOG2_E + _SLACK).to(tl.float32)
    bound = (logits - best_logit) * slope + offset - tl.log2(uniform)
    bound = tl.where(best_token < 0, float("inf"), bound)
    return tl.where(kept & (bound > 0.0), bound, float("-inf"))


@triton.jit
def consider(
    logits: tl.tensor,
    tokens: tl.tensor,
    words: tl.tensor,
    kept: tl.tensor,
    best_logit: tl.tensor,
    best_noise: tl.tensor,
    best_token: tl.tensor,
    top: tl.tensor,
    lowest: tl.tensor,
    temperature: tl.tensor,
    slope: tl.tensor,
    position: tl.tensor,
    sample: tl.tensor,
    key: tl.tensor,
    BLOCK: tl.constexpr,
    MIN_P: tl.constexpr,
) -> Any:
    """Let the kept tokens of a block compete with the best so far (best_token -1: none).

    With MIN_P, tokens with (logit - top) / temperature < lowest do not take part. Returns
    (best_logit fp32, best_noise fp64, best_token int32). The order of blocks does not matter.
    """
    lane = tl.arange(0, BLOCK)
    bound = _bound(logits, words, kept, best_logit, best_noise, best_token, slope)
    largest = tl.max(bound, 0)
    while largest > 0.0:
        at = tl.min(tl.where(bound == largest, lane, BLOCK), 0)
        token = tl.sum(tl.where(lane == at, tokens, 0), 0)
        logit = tl.sum(tl.where(lane == at, logits, 0.0), 0)
        noise_of_it = gumbel(token, position, sample, key)
        ahead = (logit.to(tl.float64) - best_logit.to(tl.float64)) / temperature
        ahead = tl.where(best_token < 0, 1.0, ahead + (noise_of_it - best_noise))
        wins = (ahead > 0.0) | ((ahead == 0.0) & (token < best_token))
        if MIN_P:
            wins = wins & ((logit.to(tl.float64) - top.to(tl.float64)) / temperature >= lowest)
        best_logit = tl.where(wins, logit, best_logit)
        best_noise = tl.where(wins, noise_of_it, best_noise)
        best_token = tl.where(wins, token, best_token)
        kept = kept & (lane != at)
        bound = _bound(logits, words, kept, best_logit, best_noise, best_token, slope)
        largest = tl.max(bound, 0)
    return best_logit, best_noise, best_token
