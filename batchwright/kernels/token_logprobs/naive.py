"""Log-probabilities of given tokens in float64: the definition, and the yardstick of numba.py."""

from __future__ import annotations

import numpy as np

from batchwright.request import Float32Array, Int32Array
from batchwright.step import TokenLogprobs


def token_logprobs(logits: Float32Array, token_ids: Int32Array, k: int) -> TokenLogprobs:
    """Twin of numba.token_logprobs."""
    num, vocab_size = logits.shape
    k = min(k, vocab_size)
    lines = TokenLogprobs(
        np.full(num, np.nan, np.float32),
        np.zeros(num, np.int32),
        np.full((num, k), -1, np.int32),
        np.full((num, k), np.nan, np.float32),
    )
    for i, token in enumerate(token_ids):
        row = logits[i].astype(np.float64)
        if token < 0 or np.isnan(row).any() or not -np.inf < row.max() < np.inf:
            continue
        row -= row.max()
        row -= np.log(np.exp(row).sum())
        lines.logprobs[i] = row[token]
        lines.ranks[i] = 1 + (row > row[token]).sum()
        lines.top_ids[i] = np.argsort(-row, kind="stable")[:k]
        lines.top_logprobs[i] = row[lines.top_ids[i]]
    return lines
