"""Where top_k and top_p cut a row: thresholds found by selection, without sorting the row.

Tokens are ordered by logit, likeliest first, ties by lower id. Every filter keeps a beginning of
that order, so a filter's answer is a cut: the key of the last kept logit and the last kept id among
the tokens that tie with it.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from batchwright.kernels.sample.rowmath import (
    GROUP,
    MINUS_INF_KEY,
    WEIGHTLESS,
    inner,
    key_float,
    order_key,
    weight,
)

NUM_BINS = 2048
OCTAVES = 4.0  # first range that top_p looks at: down to 1/16 of the largest probability
LOGIT_STEP = 4.0  # the same for a top_k beyond the number of groups, in logits
_F32 = np.float32
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_QUANTUM = 2.0**-34  # unit of weights
_LAST_BIN = np.float32(NUM_BINS - 1)
_OUTSIDE = np.int32(NUM_BINS)
_LOG2_E = math.log2(math.e)


@inner
def _num_needed(weights, size, mass, target):  # type: ignore[no-untyped-def]
    """How many of weights[:size], at least one, bring `mass` to `target`."""
    num = 1
    mass += weights[0]
    while mass < target and num < size:
        mass += weights[num]
        num += 1
    return num


@inner
def _select(keys, ids, weights, size, mass, target):  # type: ignore[no-untyped-def]
    """The cut (key, id) in a list where `mass` plus the list's weights down to it reaches `target`.

    ids ascend. Overwrites the lists. Sums are exact, so their order does not matter. Halves the
    range of keys, so no input is slow: at most 32 passes over what is left of the list.
    """
    while True:
        low, high = keys[0], keys[0]
        for i in range(size):
            low = min(low, keys[i])
            high = max(high, keys[i])
        if low == high:
            return low, ids[_num_needed(weights, size, mass, target) - 1]
        pivot = np.int32((np.int64(low) + np.int64(high)) >> 1)
        above = 0.0
        for i in range(size):
            above += weights[i] if keys[i] > pivot else _ZERO
        upper = mass + above >= target
        if not upper:
            mass += above
        kept = np.int64(0)
        for i in range(size):
            key = keys[i]
            keys[kept] = key
            ids[kept] = ids[i]
            weights[kept] = weights[i]
            kept += np.int64((key > pivot) == upper)
        size = kept


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"reassoc"})
def _sum(weights):  # type: ignore[no-untyped-def]
    # Weights are multiples of 2^-34: the sum is exact in any order, so it may be vectorised.
    total = 0.0
    for i in range(len(weights)):
        total += np.float64(weights[i])
    return total


@inner
def _end_of_run(maxima, num_groups, group, bound):  # type: ignore[no-untyped-def]
    """The first group from `group` on whose maximum is below `bound`.

    Runs of groups are done in one loop: it is a third faster than a loop per group.
    """
    while group < num_groups and maxima[group] >= bound:
        group += 1
    return group


@inner
def _weigh_run(logits, top, inverse, cut, weights):  # type: ignore[no-untyped-def]
    for i in range(len(logits)):
        w = weight((logits[i] - top) * inverse)
        weights[i] = w if logits[i] >= cut else _ZERO
    return _sum(weights)


@inner
def _weigh(row, maxima, num_groups, top, inverse, bound, cut, weights):  # type: ignore[no-untyped-def]
    """Weights 2^((logit - top) * inverse) of logits >= cut (others: 0); returns their sum.

    Only groups with a maximum of at least `bound` have weight; the others are left alone.
    """
    total = 0.0
    group = 0
    while group < num_groups:
        first, group = group, _end_of_run(maxima, num_groups, group, bound)
        if group > first:
            start, end = first * GROUP, min(group * GROUP, len(row))
            total += _weigh_run(row[start:end], top, inverse, cut, weights[start:end])
        group += 1
    return total


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"reassoc"})
def _sum_above(logits, weights, lower):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(logits)):
        total += np.float64(weights[i] if logits[i] >= lower else _ZERO)
    return total


@inner
def _mass_above(row, maxima, num_groups, lower, weights):  # type: ignore[no-untyped-def]
    """Sum of the weights of logits >= lower."""
    bound = order_key(lower)
    total = 0.0
    group = 0
    while group < num_groups:
        first, group = group, _end_of_run(maxima, num_groups, group, bound)
        if group > first:
            start, end = first * GROUP, min(group * GROUP, len(row))
            total += _sum_above(row[start:end], weights[start:end], lower)
        group += 1
    return total


@inner
def _place(logits, upper, lower, top, scale, places):  # type: ignore[no-untyped-def]
    for i in range(len(logits)):
        place = (top - logits[i]) * scale
        place = place if place < _LAST_BIN else _LAST_BIN  # also where 0 * inf made a NaN
        inside = lower <= logits[i] < upper
        places[i] = np.int32(place) if inside else _OUTSIDE


@inner
def _count(places, weights, bins):  # type: ignore[no-untyped-def]
    for i in range(len(places)):
        bins[places[i]] += np.float64(weights[i])


@inner
def _num_equal(places, edge):  # type: ignore[no-untyped-def]
    num = np.int32(0)
    for i in range(len(places)):
        num = np.int32(num + np.int32(places[i] == edge))
    return num


@inner
def _list_group(row, start, end, edge, weights, keys, ids, listed, size):  # type: ignore[no-untyped-def]
    """Append the tokens of [start, end) that lie in bin `edge` to the lists; returns their size.

    keys holds the bins of tokens not yet read; a list is never longer than what has been read.
    """
    if _num_equal(keys[start:end], edge) > 0:
        for i in range(start, end):
            if keys[i] == edge:
                keys[size] = order_key(row[i])
                ids[size] = i
                listed[size] = weights[i]
                size += 1
    return size


@inner
def _edge(  # type: ignore[no-untyped-def]
    row, maxima, num_groups, top, bound, step, target, weights, keys, ids, listed, bins
):
    """The cut (key, id) where the weights of the likeliest tokens reach `target`.

    The range of logits is extended downwards from `top`, by `step`, twice that, and so on, until it
    holds the target. A histogram of the last extension finds the bin where the target is reached;
    then only the tokens of that bin are looked at one by one. Logits below the key `bound` weigh
    nothing. `keys`, `ids` ([width] int32), `listed` ([width] float32) and `bins` ([NUM_BINS + 1]
    float64) are scratch.
    """
    mass, upper, reach = 0.0, _F32(np.inf), step
    lower = max(_F32(np.float64(top) - reach), key_float(bound))
    above = _mass_above(row, maxima, num_groups, lower, weights)
    while above < target:
        step *= 2.0
        mass, upper, reach = above, lower, reach + step
        lower = max(_F32(np.float64(top) - reach), key_float(bound))
        above = _mass_above(row, maxima, num_groups, lower, weights)

    start_logit = min(top, upper)
    scale = _F32(NUM_BINS / (np.float64(start_logit) - np.float64(lower)))
    for i in range(NUM_BINS + 1):
        bins[i] = 0.0
    bound = order_key(lower)
    group = 0
    while group < num_groups:
        first, group = group, _end_of_run(maxima, num_groups, group, bound)
        if group > first:
            start, end = first * GROUP, min(group * GROUP, len(row))
            _place(row[start:end], upper, lower, start_logit, scale, keys[start:end])
            _count(keys[start:end], weights[start:end], bins)
        group += 1
    place = np.int32(0)
    while mass + bins[place] < target:
        mass += bins[place]
        place = np.int32(place + 1)

    size = np.int64(0)
    for group in range(num_groups):
        if maxima[group] >= bound:
            start, end = group * GROUP, min(group * GROUP + GROUP, len(row))
            size = _list_group(row, start, end, place, weights, keys, ids, listed, size)
    return _select(keys, ids, listed, size, mass, target)


@inner
def top_k_cut(  # type: ignore[no-untyped-def]
    row, maxima, num_groups, top, k, weights, keys, ids, listed, bins
):
    """Key of the k-th largest logit, 1 <= k < len(row). Scratch as in top_p_cut.

    The k-th largest group maximum, if there is one, is a lower bound for it that few tokens reach.
    """
    if k > num_groups:
        for i in range(len(row)):
            weights[i] = _ONE
        return _edge(
            row,
            maxima,
            num_groups,
            top,
            MINUS_INF_KEY,
            LOGIT_STEP,
            np.float64(k),
            weights,
            keys,
            ids,
            listed,
            bins,
        )[0]
    for group in range(num_groups):
        keys[group] = maxima[group]
        listed[group] = _ONE
    bound = _select(keys, ids, listed, num_groups, 0.0, np.float64(k))[0]
    size = np.int64(0)
    for group in range(num_groups):
        if maxima[group] >= bound:
            for i in range(group * GROUP, min(group * GROUP + GROUP, len(row))):
                key = order_key(row[i])
                keys[size] = key
                listed[size] = _ONE
                size += np.int64(key >= bound)
    return _select(keys, ids, listed, size, 0.0, np.float64(k))[0]


@inner
def top_p_cut(  # type: ignore[no-untyped-def]
    row, maxima, num_groups, top, temperature, top_p, lowest, weights, keys, ids, listed, bins
):
    """The cut (key, id) of the nucleus among tokens with key >= lowest; 0 <= top_p < 1.

    The nucleus is the shortest beginning of the order whose weights sum to at least
    top_p * (sum of all weights). `weights`, `listed` ([width] float32), `keys`, `ids` ([width]
    int32) and `bins` ([NUM_BINS + 1] float64) are scratch.
    """
    inverse = _F32(_LOG2_E / temperature)
    bound = max(lowest, order_key(_F32(np.float64(top) + WEIGHTLESS / np.float64(inverse))))
    total = _weigh(row, maxima, num_groups, top, inverse, bound, key_float(lowest), weights)
    step = OCTAVES / np.float64(inverse)
    return _edge(
        row,
        maxima,
        num_groups,
        top,
        bound,
        step,
        max(top_p * total, _QUANTUM),  # top_p = 0: the first bin may be empty
        weights,
        keys,
        ids,
        listed,
        bins,
    )
