"""What a job will compute, counted before it runs: rows, tokens, duplicates, shared prefixes, work.

Everything about prompts is known exactly. Output lengths are not: `OutputLengths` has a lowest, a
likely and a highest end, and says where each comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchwright.folding import MAX_RECENT_RESULTS
from batchwright.plan.cost import num_keys
from batchwright.plan.job_rows import TASKS, JobRows, RowColumns
from batchwright.plan.shape import ModelShape
from batchwright.plan.sharing import shared_blocks
from batchwright.request import Task

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

LIKELY_SHARE = 0.5
"""Share of the allowed output tokens that rows are expected to use when nothing is known."""


@dataclass(frozen=True, slots=True)
class OutputLengths:
    """Output tokens of one sequence of each row, at three ends.

    Attributes:
        low, likely, high: [num_rows].
        share: of the allowed tokens, that the likely end takes.
        is_measured: the share is that of rows that are finished.
    """

    low: Int64Array
    likely: Int64Array
    high: Int64Array
    share: float
    is_measured: bool


def output_lengths(
    columns: RowColumns, used_share: float | npt.NDArray[np.float64] | None
) -> OutputLengths:
    """Bounds from what rows allow, and between them what finished rows used, or LIKELY_SHARE.

    The likely lengths are not all of one share: some rows end early, some use all. That makes the
    end of a job longer, when few rows run. LIKELY_SHARE spreads them evenly from nothing to all.

    Args:
        used_share: share of their allowed tokens that finished rows used, or [num_rows] what is
            expected of each row; None if nothing is finished.
    """
    share = np.asarray(LIKELY_SHARE if used_share is None else used_share, np.float64)
    used = even_numbers(len(columns)) ** (1 / np.maximum(share, 1e-3) - 1)  # whose mean is `share`
    likely = np.rint(used * columns.most_output).astype(np.int64)
    likely = np.clip(likely, columns.least_output, columns.most_output)
    num_most = max(int(columns.most_output.sum()), 1)
    mean = float((share * columns.most_output).sum() / num_most) if share.ndim else float(share)
    return OutputLengths(
        columns.least_output, likely, columns.most_output, mean, used_share is not None
    )


def even_numbers(count: int) -> npt.NDArray[np.float64]:
    """So many numbers between 0 and 1, in no order, that cover it evenly; always the same."""
    golden_ratio = (1 + 5**0.5) / 2
    return (np.arange(count, dtype=np.float64) + 0.5) * golden_ratio % 1


@dataclass(frozen=True, slots=True)
class Work:
    """What is computed, in counts that add up.

    Attributes:
        num_prompt_tokens, num_output_tokens: tokens that go through the layers.
        num_keys: (query token, key) pairs, per KV group.
        num_logits: lines of logits.
        num_draws: tokens drawn from them.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_keys: tuple[int, ...]
    num_logits: int
    num_draws: int

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the layers."""
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Savings:
    """What rows do not have to compute.

    Attributes:
        folded: [num_rows] the row is answered by an identical one.
        cached: [num_rows] prompt tokens taken from blocks of rows before; 0 for folded rows.
        num_shared_in_job: what `cached` would add up to if blocks were kept until their last use,
            however far away. (Folded rows share nothing: they compute nothing.)
    """

    folded: BoolArray
    cached: Int64Array
    num_shared_in_job: int


def find_savings(
    rows: JobRows, columns: RowColumns, *, block_size: int, horizon: int, sharing: bool = True
) -> Savings:
    """Duplicates and shared prefixes, as the engine finds them with memory to spare.

    Args:
        horizon: rows the engine has at once.
        sharing: whether prompts share blocks.
    """
    folded = folded_rows(columns, horizon + MAX_RECENT_RESULTS)
    cached = np.zeros(len(columns), np.int64)
    if not sharing or not len(columns):
        return Savings(folded, cached, 0)
    tokens, starts = rows.store.tokens(), rows.store.offsets[:-1]
    own = np.flatnonzero(~folded)
    mine = columns.at(own)

    def num_cached(distance: int | None) -> Int64Array:
        blocks = shared_blocks(
            tokens,
            starts[own],
            mine.num_prompt // block_size,
            mine.num_computable // block_size,
            block_size=block_size,
            horizon=distance,
            places=mine.place,
        )
        return np.minimum(blocks * block_size, mine.first_needed)

    cached[own] = num_cached(horizon)
    is_long = len(columns) > 0 and int(columns.place[-1]) > horizon
    in_job = int(num_cached(None).sum()) if is_long else int(cached.sum())
    return Savings(folded, cached, in_job)


def folded_rows(columns: RowColumns, window: int) -> BoolArray:
    """[num_rows] whether an identical row stands at most `window` rows before this one."""
    order = np.argsort(columns.fold, kind="stable")
    fold, place = columns.fold[order], columns.place[order]
    follows = np.zeros(len(order), np.bool_)
    follows[1:] = (fold[1:] == fold[:-1]) & (fold[1:] != 0) & (np.diff(place) <= window)
    folded = np.zeros(len(order), np.bool_)
    folded[order] = follows
    return folded


def count_work(
    columns: RowColumns, savings: Savings, output: Int64Array, shape: ModelShape
) -> Work:
    """What the rows that are not folded compute.

    Args:
        output: [num_rows] output tokens of each sequence.
    """
    own = ~savings.folded
    mine, cached, output = columns.at(own), savings.cached[own], output[own]
    generates = mine.task == TASKS.index(Task.GENERATE)
    ends = mine.num_prompt + np.maximum(output - 1, 0)  # the last token is not fed back
    keys = []
    for attention in shape.attention:
        in_prompt = num_keys(mine.num_computable, attention.window)
        in_prompt = in_prompt - num_keys(cached, attention.window)
        in_output = num_keys(ends, attention.window) - num_keys(mine.num_prompt, attention.window)
        keys.append(int((in_prompt + in_output * mine.num_samples).sum()))
    scored = np.maximum(mine.num_prompt - 1 - mine.first_needed, 0)
    scored[mine.task == TASKS.index(Task.EMBED)] = 0
    decoded = np.where(generates, mine.num_samples * np.maximum(output - 1, 0), 0)
    return Work(
        num_prompt_tokens=int((mine.num_computable - cached).sum()),
        num_output_tokens=int(decoded.sum()),
        num_keys=tuple(keys),
        num_logits=int((scored + generates + decoded).sum()),
        num_draws=int((mine.num_samples * output).sum()),
    )


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a job as they are asked for and answered, and what is saved of them.

    Attributes:
        num_prompt: of all rows that can run.
        num_folded: prompt tokens of rows that are answered by an identical one.
        num_shared: prompt tokens that are taken from blocks of other rows.
        num_shared_in_job: the same if blocks were kept until their last use.
        num_forked: prompt tokens that further samples of a row do not compute again.
        output: of all rows, at the low, likely and high end.
    """

    num_prompt: int
    num_folded: int
    num_shared: int
    num_shared_in_job: int
    num_forked: int
    output: tuple[int, int, int]


def count_tokens(columns: RowColumns, savings: Savings, lengths: OutputLengths) -> Tokens:
    """Add the rows up."""
    own = ~savings.folded
    samples = columns.num_samples
    return Tokens(
        num_prompt=int(columns.num_prompt.sum()),
        num_folded=int(columns.num_prompt[savings.folded].sum()),
        num_shared=int(savings.cached.sum()),
        num_shared_in_job=savings.num_shared_in_job,
        num_forked=int((columns.num_prompt * (samples - 1))[own].sum()),
        output=(
            int((lengths.low * samples).sum()),
            int((lengths.likely * samples).sum()),
            int((lengths.high * samples).sum()),
        ),
    )
