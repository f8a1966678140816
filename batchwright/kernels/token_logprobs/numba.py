"""Log-probabilities of given tokens, with rank and likeliest rivals, without a log-softmax tensor.

Per row: one pass for group maxima, one for the sum of exponentials (groups that cannot matter are
skipped), and the rank and the rivals from the groups whose maximum qualifies. Exponentials are
float32 with relative error 2e-7 and are summed in float64, so a log-probability is within 3e-7 nats
of the exact one before it is rounded to float32.

Exactness level *bits*: a line depends on its own row only. Twin: naive.py.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import njit, types

from batchwright.kernels import get_num_threads
from batchwright.kernels.arguments import argument_reader
from batchwright.kernels.parallel import Task, compile_task, own, read_only, run_tasks
from batchwright.kernels.sample.rowmath import (
    GROUP,
    exp2_32,
    group_maxima,
    inner,
    is_sound,
    key_float,
    num_groups,
    order_key,
)
from batchwright.request import Float32Array, Int32Array
from batchwright.step import TokenLogprobs

_F32 = np.float32
_LOG2_E = np.float32(math.log2(math.e))
_CHUNK = 32 * GROUP
_NEGLIGIBLE = np.float32(-60.0)  # 2^-60 of the largest weight: below float64 rounding of the sum


def token_logprobs(logits: Float32Array, token_ids: Int32Array, k: int) -> TokenLogprobs:
    """Log-softmax of each row at its token, the token's rank, and the k likeliest tokens.

    Args:
        logits: [num, vocab_size] float32, C-contiguous: raw logits. Callers pass a few rows at a
            time, never a whole prompt.
        token_ids: [num] int32; -1 for none.
        k: alternatives per row, at most vocab_size are given.
    Returns:
        TokenLogprobs. rank = 1 + number of strictly larger logits, so rank 1 means that greedy
        decoding could have chosen the token (it does if no tied token has a lower id). Rivals are
        likeliest first, ties by lower id. A row with a NaN or +inf or without a finite logit, and a
        token -1, give NaN, rank 0 and ids -1.
    """
    rows = np.arange(len(token_ids), dtype=np.int32)
    return logprob_rows(logits, rows, token_ids, np.full(len(token_ids), k, np.int32))


def logprob_rows(
    logits: Float32Array, row_of_token: Int32Array, token_ids: Int32Array, num_top: Int32Array
) -> TokenLogprobs:
    """The same for tokens that name their logits row and their own number of rivals.

    row_of_token, token_ids, num_top: [num] int32. num_top[i] < 0 leaves line i empty (NaN, rank 0,
    ids -1), and so do places beyond it: lines are max(num_top) wide.
    """
    num, vocab_size = len(token_ids), logits.shape[1]
    k = max(0, min(int(num_top.max(initial=0)), vocab_size))
    lines = TokenLogprobs(
        np.full(num, np.nan, np.float32),
        np.zeros(num, np.int32),
        np.full((num, k), -1, np.int32),
        np.full((num, k), np.nan, np.float32),
    )
    num_tasks = get_num_threads()
    run_tasks(
        _worker(),
        num_tasks,
        read_only(logits),
        own(row_of_token, np.int32),
        own(token_ids, np.int32),
        own(num_top, np.int32),
        np.empty((num_tasks, num_groups(vocab_size)), np.int32),
        np.empty((num_tasks, _CHUNK), np.float32),
        *lines,
    )
    return lines


# The same polynomial with fused multiply-adds where the CPU has them: a quarter fewer operations.
_exp2 = njit(
    no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True, fastmath={"contract"}
)(exp2_32.py_func)


@inner
def _exponentials(logits, top, out):  # type: ignore[no-untyped-def]
    for i in range(len(logits)):
        out[i] = _exp2((logits[i] - top) * _LOG2_E)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"reassoc"})
def _sum(values):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(values)):
        total += np.float64(values[i])
    return total


@inner
def _log_sum(row, maxima, top, buffer):  # type: ignore[no-untyped-def]
    """log of the sum of exp(row - top), float64; `buffer` is scratch, [CHUNK] float32."""
    total = 0.0
    for chunk in range(0, len(maxima), _CHUNK // GROUP):
        largest = maxima[chunk]
        for group in range(chunk + 1, min(chunk + _CHUNK // GROUP, len(maxima))):
            largest = max(largest, maxima[group])
        if (key_float(largest) - top) * _LOG2_E >= _NEGLIGIBLE:
            part = row[chunk * GROUP : chunk * GROUP + _CHUNK]
            _exponentials(part, top, buffer)
            total += _sum(buffer[: len(part)])
    return math.log(total)


@inner
def _num_larger(row, maxima, logit):  # type: ignore[no-untyped-def]
    key = order_key(logit)
    larger = np.int32(0)
    for group in range(len(maxima)):
        if maxima[group] > key:
            for i in range(group * GROUP, min(group * GROUP + GROUP, len(row))):
                larger = np.int32(larger + np.int32(row[i] > logit))
    return larger


@inner
def _likeliest(row, maxima, k, ids, values):  # type: ignore[no-untyped-def]
    """The k largest logits into values and ids, by insertion; equal logits keep their order."""
    size = 0
    for group in range(len(maxima)):
        if size == k and key_float(maxima[group]) <= values[k - 1]:
            continue
        for i in range(group * GROUP, min(group * GROUP + GROUP, len(row))):
            logit = row[i]
            if size == k and not logit > values[k - 1]:
                continue
            place = min(size, k - 1)
            while place > 0 and logit > values[place - 1]:
                values[place] = values[place - 1]
                ids[place] = ids[place - 1]
                place -= 1
            values[place] = logit
            ids[place] = i
            size = min(size + 1, k)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")
def _logprobs(  # type: ignore[no-untyped-def]
    task,
    num_tasks,
    logits,
    row_of_token,
    token_ids,
    num_top,
    all_maxima,
    buffers,
    logprobs,
    ranks,
    top_ids,
    top_logprobs,
):
    """Lines task, task + num_tasks, ...; see logprob_rows."""
    maxima, buffer = all_maxima[task], buffers[task]
    for i in range(task, len(token_ids), num_tasks):
        token = token_ids[i]
        if num_top[i] < 0 or token < 0:
            continue
        row = logits[row_of_token[i]]
        largest, smallest = group_maxima(row, maxima)
        if not is_sound(largest, smallest):
            continue
        top = key_float(largest)
        log_sum = _log_sum(row, maxima, top, buffer)
        logprobs[i] = _F32((np.float64(row[token]) - np.float64(top)) - log_sum)
        ranks[i] = 1 + _num_larger(row, maxima, row[token])
        k = min(num_top[i], len(row))
        if k > 0:
            _likeliest(row, maxima, k, top_ids[i], top_logprobs[i])
            for j in range(k):
                value = np.float64(top_logprobs[i, j])
                top_logprobs[i, j] = _F32((value - np.float64(top)) - log_sum)


_read = argument_reader(
    types.Array(types.float32, 2, "C", readonly=True),
    types.int32[::1],
    types.int32[::1],
    types.int32[::1],
    types.int32[:, ::1],
    types.float32[:, ::1],
    types.float32[::1],
    types.int32[::1],
    types.int32[:, ::1],
    types.float32[:, ::1],
)


def _logprob_task(task: int, num_tasks: int, at: int) -> None:
    _logprobs(task, num_tasks, *_read(at))


@functools.cache
def _worker() -> Task:
    return compile_task(_logprob_task)
