"""Synthetic workloads: lengths, prefixes, and what their text forms mean."""

from __future__ import annotations

import numpy as np
import pytest

from batchwright.errors import ConfigError
from batchwright.plan.job_tree import build_job_tree
from batchwright.synthetic import (
    NAMED,
    Lengths,
    Level,
    Part,
    make_workload,
    named_workload,
    parse_lengths,
    parse_tree,
)


def test_lengths_as_text() -> None:
    assert parse_lengths("512") == Lengths(512, 512, 512)
    assert parse_lengths(" 100-900 ") == Lengths(100, 900, 100)
    assert parse_lengths("400~0.7") == Lengths(1, 3200, 400, 0.7)


@pytest.mark.parametrize("text", ["", "0", "x", "9-3", "-5", "400~", "400~0.7-9", "2000000", "1e3"])
def test_what_is_no_length_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="no length"):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["", "8", "8x", "0x5", "8x0", "8x10,", "8x10;4x2"])
def test_what_is_no_tree_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="no level"):
        parse_tree(text)


def test_a_tree_as_text() -> None:
    assert parse_tree("8x1000,16x200") == (Level(8, 1000), Level(16, 200))


def test_drawn_lengths_have_the_mean_that_was_asked_for() -> None:
    rng = np.random.default_rng(1)
    drawn = parse_lengths("400~0.7").draw(20_000, rng)
    assert drawn.mean() == pytest.approx(400, rel=0.03)
    assert drawn.min() >= 1 and drawn.max() <= 3200
    evenly = parse_lengths("100-900").draw(20_000, rng)
    assert (evenly.min(), evenly.max()) == (100, 900)
    assert evenly.mean() == pytest.approx(500, rel=0.02)


def test_rows_share_the_prefixes_of_the_tree_and_nothing_else() -> None:
    part = Part(parse_lengths("7"), parse_lengths("5"), parse_tree("2x10,3x20"))
    workload = make_workload((part,), 12)
    tree = build_job_tree(workload.rows.store.tokens(), workload.rows.store.offsets)
    assert tree.num_distinct_tokens() == 2 * 10 + 6 * 20 + 12 * 7
    assert workload.columns.num_prompt.tolist() == [37] * 12
    assert workload.output.tolist() == [5] * 12


def test_parts_get_their_share_of_the_rows_in_random_order() -> None:
    parts = (
        Part(parse_lengths("8"), parse_lengths("2"), share=3.0),
        Part(parse_lengths("9"), parse_lengths("4"), share=1.0),
    )
    workload = make_workload(parts, 100, seed=3)
    is_first = workload.columns.num_prompt == 8
    assert is_first.sum() == 75 and (workload.output == np.where(is_first, 2, 4)).all()
    assert 0 < is_first[:50].sum() < 50
    again = make_workload(parts, 100, seed=3)
    assert again.rows.store.tokens().tolist() == workload.rows.store.tokens().tolist()


def test_rows_may_allow_more_than_they_use() -> None:
    part = Part(parse_lengths("8"), parse_lengths("100-900"))
    workload = make_workload((part,), 50, max_tokens=500)
    assert (workload.columns.most_output == 500).all()
    assert workload.output.max() == 500 > workload.output.min()


def test_names() -> None:
    assert all(named_workload(name).parts for name in NAMED)
    with pytest.raises(ConfigError, match="chat, documents"):
        named_workload("nothing")
