"""A classifier over ten buckets of length, trained on the rows of the job that have ended (S3,
arXiv:2306.06000).

The paper tunes DistilBERT; here a softmax regression looks at which tokens a prompt has (hashed),
how long it is and what it may use, which costs microseconds a row. A bucket is a tenth of what the
row may have; memory is kept to the upper edge of one that a row will probably not pass.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchwright.plan.job_tree import Int64Array
from batchwright.plan.length_predictor import Lengths, Rows
from batchwright.request import Int32Array

NUM_BUCKETS = 10
NUM_HASHES = 512
MOST_KNOWN = 1024
"""Rows that are kept to be trained on again, the latest."""

LEAST_KNOWN = 16
PASSES = 8
BATCH_ROWS = 64
LEARNING_RATE = 0.3
QUANTILE = 0.9
"""Chance that a row ends within the memory that is kept for it (benchmarks/lengths.py)."""

SEED = 0x53

Float32Array = npt.NDArray[np.float32]


class Predictor:
    """Softmax regression with Adagrad steps."""

    def __init__(self) -> None:
        num_features = NUM_HASHES + 3
        self._weights: Float32Array = np.zeros((num_features, NUM_BUCKETS), np.float32)
        self._squares: Float32Array = np.full_like(self._weights, 1e-6)
        self._features: Float32Array = np.empty((0, num_features), np.float32)
        self._buckets: Int64Array = np.empty(0, np.int64)
        self._random = np.random.default_rng(SEED)

    def learn(self, rows: Rows, output: Int64Array) -> None:
        """Train on these and on those before them."""
        features = np.concatenate((self._features, _features(rows)))
        buckets = np.concatenate((self._buckets, bucket_of(output, rows.most)))
        self._features, self._buckets = features[-MOST_KNOWN:], buckets[-MOST_KNOWN:]
        for _ in range(PASSES):
            order = self._random.permutation(len(self._buckets))
            for first in range(0, len(order), BATCH_ROWS):
                self._descend(order[first : first + BATCH_ROWS])

    def predict(self, rows: Rows, so_far: Int64Array) -> Lengths:
        """The mean over the buckets that a row can still end in, and an edge it will not pass."""
        most = rows.most.astype(np.float64)
        if len(self._buckets) < LEAST_KNOWN:
            return Lengths(most, most)
        chances = _softmax(_features(rows) @ self._weights).astype(np.float64)
        edges = upper_edge(np.arange(NUM_BUCKETS), most[:, None])
        chances[edges <= so_far[:, None]] = 0.0
        chances[:, -1] += 1e-9
        middle = edges - most[:, None] / (2 * NUM_BUCKETS)
        mean = (chances * middle).sum(axis=1) / chances.sum(axis=1)
        reached = np.cumsum(chances / chances.sum(axis=1, keepdims=True), axis=1)
        place = (reached >= QUANTILE - 1e-9).argmax(axis=1)
        return Lengths(mean, np.take_along_axis(edges, place[:, None], 1)[:, 0])

    def _descend(self, lines: Int64Array) -> None:
        features = self._features[lines]
        slope = _softmax(features @ self._weights)
        slope[np.arange(len(lines)), self._buckets[lines]] -= 1.0
        gradient = features.T @ slope / np.float32(len(lines))
        self._squares += gradient**2
        self._weights -= np.float32(LEARNING_RATE) * gradient / np.sqrt(self._squares)


def bucket_of(output: Int64Array, most: Int64Array) -> Int64Array:
    """[num_rows] the bucket of each length; its upper edge belongs to it: 50 of 500 is in 0, 51 in
    1."""
    width = np.maximum(most, 1) / NUM_BUCKETS
    return np.clip(np.ceil(output / width).astype(np.int64) - 1, 0, NUM_BUCKETS - 1)


def upper_edge(buckets: Int64Array, most: np.ndarray) -> np.ndarray:
    """Largest length of each bucket."""
    return (buckets + 1) * most / NUM_BUCKETS


def _softmax(scores: Float32Array) -> Float32Array:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _features(rows: Rows) -> Float32Array:
    """[num_rows, NUM_HASHES + 3]: which tokens, as a vector of length 1; constant; two lengths."""
    num_rows = len(rows.prompts)
    lengths = np.array([len(prompt) for prompt in rows.prompts], np.int64)
    tokens = np.concatenate([np.empty(0, np.int32), *rows.prompts])
    places = np.repeat(np.arange(num_rows), lengths) * NUM_HASHES + _hash(tokens)
    counts = np.bincount(places, minlength=num_rows * NUM_HASHES)
    has = np.sqrt(counts.reshape(num_rows, NUM_HASHES)).astype(np.float32)
    has /= np.sqrt(np.maximum(lengths, 1))[:, None].astype(np.float32)
    others = np.stack(
        (np.ones(num_rows), np.log2(lengths + 1) / 8 - 1, np.log2(rows.most + 1) / 8 - 1), axis=1
    )
    return np.concatenate((has, others.astype(np.float32)), axis=1)


def _hash(tokens: Int32Array) -> Int64Array:
    mixed = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(55)).astype(np.int64)  # 9 bits
