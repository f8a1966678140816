"""How long the rows of a job will be, by those that an earlier run of it has finished."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchwright.errors import RequestError
from batchwright.job.feed import EndedRow
from batchwright.limits import ModelLimits
from batchwright.plan.job_rows import JobRows, RowColumns
from batchwright.plan.job_tree import Float64Array
from batchwright.plan.length_predictor import LengthPredictor, Rows

CHUNK_ROWS = 8192
"""Rows that are asked about at once, so that planning takes little memory beside the tokens."""


def expected_shares(
    rows: JobRows,
    columns: RowColumns,
    ended: Sequence[EndedRow],
    limits: ModelLimits,
    predictor: LengthPredictor,
) -> Float64Array | None:
    """[num_rows] share of its allowed output tokens that each row will probably use.

    Args:
        ended: finished rows and their lengths.
        predictor: a new one.
    Returns:
        None if these tell nothing: none is finished, or the predictor does not learn.
    """
    known = [(row.request, row.num_output, m) for row in ended if (m := _most(row, limits))]
    if not known:
        return None
    requests, output, allowed = zip(*known, strict=True)
    prompts = [request.prompt_token_ids for request in requests]
    predictor.learn(Rows(prompts, np.array(allowed)), np.array(output))
    tokens, offsets = rows.store.tokens(), rows.store.offsets
    shares = np.ones(len(columns))
    for first in range(0, len(columns), CHUNK_ROWS):
        chunk = range(first, min(first + CHUNK_ROWS, len(columns)))
        prompts = [tokens[offsets[row] : offsets[row + 1]] for row in chunk]
        most = columns.most_output[chunk.start : chunk.stop]
        mean = predictor.predict(Rows(prompts, most), np.zeros(len(chunk), np.int64)).mean
        shares[chunk.start : chunk.stop] = np.clip(mean / np.maximum(most, 1), 0.0, 1.0)
    return None if (shares == 1.0).all() else shares


def _most(row: EndedRow, limits: ModelLimits) -> int:
    """Output tokens that a finished row might have had; 0 if that is not known any more."""
    try:
        return limits.check(row.request) - row.request.num_prompt_tokens
    except RequestError:
        return 0
