"""Sampling as its definition says it: sort, cut, add all the noise, take the largest. NumPy.

One row at a time, many passes over it: the yardstick of numba.py, which must draw the same tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from batchwright.request import Float32Array, Int32Array
from batchwright.sampling.noise import gumbel_noise

BoolArray = npt.NDArray[np.bool_]


def adjust_logits(
    logits: Float32Array,
    *,
    bias: dict[int, float],
    prompt_ids: Int32Array,
    output_ids: Int32Array,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    suppressed_ids: tuple[int, ...] = (),
    allowed: BoolArray | None = None,
) -> Float32Array:
    """A changed copy of one row of raw logits, [vocab_size] float32.

    Order, that of vLLM: logit_bias; repetition penalty on the distinct tokens of prompt and output;
    frequency, then presence penalty on those of the output; -inf for suppressed and not allowed
    tokens.
    """
    row = logits.copy()
    for token, value in bias.items():
        row[token] += np.float32(value)
    output, counts = np.unique(output_ids, return_counts=True)
    if repetition_penalty != 1.0:
        seen = np.union1d(prompt_ids, output_ids)
        penalty = np.float32(repetition_penalty)
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    row[output] -= np.float32(frequency_penalty) * counts.astype(np.float32)
    row[output] -= np.float32(presence_penalty)
    row[list(suppressed_ids)] = -np.inf
    if allowed is not None:
        row[~allowed] = -np.inf
    return row


def is_sound(row: Float32Array) -> bool:
    """No NaN, no +inf, and at least one finite logit."""
    return not np.isnan(row).any() and -np.inf < row.max() < np.inf


def kept_tokens(
    row: Float32Array, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> BoolArray:
    """Which tokens the filters keep, [vocab_size] bool, for temperature > 0.

    top_k (0: off) keeps the k largest logits and all that tie with the last of them. top_p (1: off)
    then keeps the shortest beginning of the order "likeliest first, ties by lower id" that holds at
    least top_p of the probability left by top_k. min_p (0: off) keeps tokens at least min_p times
    as likely as the likeliest. The likeliest token is always kept.
    """
    kept = np.ones(len(row), np.bool_)
    if 0 < top_k < len(row):
        kept &= row >= np.sort(row)[-top_k]
    if top_p < 1.0:
        weight = np.where(kept, weights(row, temperature), np.float32(0.0)).astype(np.float64)
        order = np.argsort(-row, kind="stable")
        mass = np.cumsum(weight[order])
        num_kept = int(np.searchsorted(mass, top_p * mass[-1])) + 1
        kept[order[num_kept:]] = False
    if min_p > 0.0:
        kept &= scaled(row, temperature) >= math.log(min_p)
    return kept


def scaled(row: Float32Array, temperature: float) -> npt.NDArray[np.float64]:
    """(logit - largest logit) / temperature, float64."""
    with np.errstate(over="ignore"):
        difference: npt.NDArray[np.float64] = row.astype(np.float64) - np.float64(row.max())
        return difference / temperature


def weights(row: Float32Array, temperature: float) -> Float32Array:
    """exp((logit - largest) / temperature), float32, as top_p sums it: in multiples of 2^-34.

    Such weights add up without rounding in float64 (2^19 tokens at most), so that the nucleus does
    not depend on the order of summation. The same operations as rowmath.weight, one by one.
    """
    f32 = np.float32
    with np.errstate(over="ignore", under="ignore"):
        y = (row - row.max()) * f32(math.log2(math.e) / temperature)
    y = np.maximum(y, f32(-126.0))
    n = np.rint(y)
    r = y - n
    p = np.full_like(r, 0.001326472731307149)
    for coefficient in (
        0.009671512991189957,
        0.05550733581185341,
        0.24022242426872253,
        0.6931470036506653,
        1.0,
    ):
        p = p * r + f32(coefficient)
    power = np.ldexp(p, n.astype(np.int32))
    quantum = f32(2.0**-11)
    return np.where(power < quantum, (power + quantum) - quantum, power)


def draw_token(
    row: Float32Array,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    noise_key: int = 0,
    sample_index: int = 0,
    output_position: int = 0,
) -> int:
    """One token from one row of adjusted logits; -1 if the row is not sound."""
    if not is_sound(row):
        return -1
    if temperature == 0.0:
        return int(np.argmax(row))
    kept = kept_tokens(row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens = np.arange(len(row), dtype=np.int32)
    score = scaled(row, temperature) + gumbel_noise(
        noise_key, sample_index, output_position, tokens
    )
    return int(np.argmax(np.where(kept, score, -np.inf)))


def argmax_rows(logits: Any, row_of_sample: Int32Array) -> Int32Array:
    """Twin of numba.argmax_rows."""
    rows = (logits[i] for i in row_of_sample)
    return np.array([np.argmax(row) if is_sound(row) else -1 for row in rows], np.int32)
