"""Counts of a Step against the same counted one token at a time."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.plan.shape import AttentionShape, ModelShape, Product
from batchwright.sched.work import Work, work_flops

NUM_SLOTS = 6

Row = tuple[int, int, int, int]  # first position, tokens, prompt length, computed before

rows = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 60), st.integers(0, 80)),
    min_size=1,
    max_size=NUM_SLOTS,
)


def step_of(rows: list[Row]) -> tuple[Any, np.ndarray, np.ndarray]:
    """(what counting reads of a Step, prompt lengths and computed_once by slot)"""
    slots = np.arange(NUM_SLOTS, dtype=np.int32)[::-1][: len(rows)].copy()
    num_prompt, once = np.zeros(NUM_SLOTS, np.int32), np.zeros(NUM_SLOTS, np.int32)
    num_prompt[slots] = [row[2] for row in rows]
    once[slots] = [row[3] for row in rows]
    positions = np.concatenate([np.arange(first, first + count) for first, count, _, _ in rows])
    cu_seqlens_q = np.cumsum([0, *(row[1] for row in rows)]).astype(np.int32)
    step = SimpleNamespace(
        slots=slots,
        positions=positions.astype(np.int32),
        cu_seqlens_q=cu_seqlens_q,
        num_rows=len(rows),
        num_tokens=len(positions),
        sample_tokens=np.array([0, 0, len(positions) - 1], np.int32),  # a fork, and another row
        score_tokens=np.arange(2, dtype=np.int32),
    )
    return step, num_prompt, once


@pytest.mark.parametrize("windows", [[None], [None, 7]])
@given(steps=st.lists(rows, min_size=1, max_size=3))
def test_tokens_and_keys(windows: list[int | None], steps: list[list[Row]]) -> None:
    work, tokens = Work(), []
    for step_rows in steps:
        step, num_prompt, once = step_of(step_rows)
        work.add(step, num_prompt, once, windows)
        for first, count, prompt, before in step_rows:
            tokens += [(p, p < prompt, p < before) for p in range(first, first + count)]

    def keys(chosen: list[int]) -> list[int]:
        return [sum(min(p + 1, window or p + 1) for p in chosen) for window in windows]

    assert work.num_rows == sum(map(len, steps))
    assert work.num_prompt_tokens == sum(in_prompt for _, in_prompt, _ in tokens)
    assert work.num_output_tokens == sum(not in_prompt for _, in_prompt, _ in tokens)
    assert work.num_recomputed_tokens == sum(again for _, _, again in tokens)
    assert work.num_prompt_keys == keys([p for p, in_prompt, _ in tokens if in_prompt])
    assert work.num_output_keys == keys([p for p, in_prompt, _ in tokens if not in_prompt])
    assert work.num_recomputed_keys == keys([p for p, _, again in tokens if again])
    assert work.num_scored == 2 * len(steps)


def test_forks_share_their_logits() -> None:
    work = Work()
    work.add(*step_of([(0, 5, 5, 0), (9, 1, 4, 0)]), [None])
    assert work.num_logits == 2


def test_flops() -> None:
    shape = ModelShape(
        hidden_size=4,
        vocab_size=10,
        num_layers=2,
        products=(Product(4, 8, num_weights=2),),
        head=Product(4, 10),
        attention=(AttentionShape(None, 1, 2, 1, 2), AttentionShape(7, 1, 2, 1, 2)),
        num_params=0,
    )
    assert work_flops(shape, 3, [10, 6], 2) == (3 * 2 * 4 * 8 * 2 + 16 * (10 + 6), 2 * 2 * 4 * 10)
    assert work_flops(shape, 0, [], 0) == (0, 0)
