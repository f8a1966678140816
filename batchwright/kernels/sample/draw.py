"""The Gumbel-max draw, with logarithms only for tokens that can still win. Numba; see README.md."""

from __future__ import annotations

import math

import numpy as np

from batchwright.kernels.sample.philox import gumbel, high_words, token_word
from batchwright.kernels.sample.rowmath import (
    GROUP,
    bits_float,
    inlined,
    inner,
    key_float,
    order_key,
)
from batchwright.sampling.noise import HIGH_DOMAIN, MAX_NOISE

_F32 = np.float32
_I32 = np.int32
_U64 = np.uint64
_LOG2_E = math.log2(math.e)
_SLACK = 2e-3  # in log2 units; rounding of the bound is below 1e-4
_ULPS = 2.0**-22
_BIAS = np.float32(127.0)
_LOWEST = np.float32(-126.0)
_MANTISSA = np.float32(2.0**23)
_HALF_WORD = np.float32(2.0**-31)


@inner
def draw(  # type: ignore[no-untyped-def]
    row, maxima, num_groups, slot, position, cut_key, cut_id, first, words, halves
):
    """argmax of x + G over tokens up to the cut with x >= log(min_p); ties go to the lower id.

    x = (logit - largest logit) / temperature in float64. `first` is the likeliest token, where the
    search starts so that the best score is high early. `words` ([GROUP // 2] uint64) is scratch and
    `halves` the same memory as uint32.
    """
    key_0, key_1 = slot.noise_key & _U64(0xFFFFFFFF), slot.noise_key >> _U64(32)
    where, sample = _U64(position), _U64(slot.sample_index)
    top32, temperature = row[first], slot.temperature
    top = np.float64(top32)
    lowest = math.log(slot.min_p) if slot.min_p > 0.0 else -np.inf
    slope = _F32(_LOG2_E / temperature)
    cut = key_float(cut_key)

    token = first
    word = token_word(first, where, sample, HIGH_DOMAIN, key_0, key_1)
    best = gumbel(first, word, where, sample, key_0, key_1)
    offset = _F32(_SLACK - best * _LOG2_E)
    floor = max(cut_key, _floor_key(top, max(lowest, best - MAX_NOISE), temperature))
    for group in range(num_groups):
        if maxima[group] < floor:
            continue
        high_words(group, where, sample, key_0, key_1, words)
        start, end = group * GROUP, min(group * GROUP + GROUP, len(row))
        hits = _I32(0)  # a 32-bit count keeps the loop in 32-bit lanes
        if end - start == GROUP:
            for i in range(GROUP):
                hits = _I32(hits + _can_win(row[start + i], top32, slope, offset, halves[i]))
        else:
            for i in range(end - start):
                hits = _I32(hits + _can_win(row[start + i], top32, slope, offset, halves[i]))
        if hits == 0:
            continue
        for i in range(end - start):
            logit = row[start + i]
            if _can_win(logit, top32, slope, offset, halves[i]) == 0:
                continue
            x = (np.float64(logit) - top) / temperature
            if logit < cut or (logit == cut and start + i > cut_id) or x < lowest:
                continue
            score = x + gumbel(start + i, _U64(halves[i]), where, sample, key_0, key_1)
            if score > best or (score == best and start + i < token):
                token, best = start + i, score
                offset = _F32(_SLACK - best * _LOG2_E)
                floor = max(floor, _floor_key(top, best - MAX_NOISE, temperature))
    return token


@inner
def _floor_key(top, lowest, temperature):  # type: ignore[no-untyped-def]
    """A key such that logits below it have x < lowest; rounding only lowers it."""
    floor = top + lowest * temperature
    return order_key(_F32(floor - abs(floor) * _ULPS))


@inlined
def _can_win(logit, top, slope, offset, high):  # type: ignore[no-untyped-def]
    """0 only if high / 2^32 > exp(x - best), when the token's score is below best.

    The float32 with bits (y + 127) 2^23 is at least 2^y: it is linear between powers of two.
    """
    y = (logit - top) * slope + offset
    y = y if y > _LOWEST else _LOWEST
    y = y if y < _F32(0.0) else _F32(0.0)
    limit = bits_float(_I32((y + _BIAS) * _MANTISSA))
    return _I32(_F32(_I32(high >> np.uint32(1))) * _HALF_WORD <= limit)
