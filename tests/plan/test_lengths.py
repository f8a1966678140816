"""Lengths from samples against their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.plan.lengths.subtree import lengths_from_samples
from batchwright.plan.orders.density import density
from tests.plan.tries import branching, job_of, tree_of

PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=12)


@settings(max_examples=150)
@given(PROMPTS, st.data())
def test_mean_of_the_smallest_subtree_with_samples(prompts, data: st.DataObject) -> None:
    values = st.lists(
        st.integers(0, 9) | st.just(np.nan), min_size=len(prompts), max_size=len(prompts)
    )
    known = np.array(data.draw(values), np.float64)
    tree = tree_of(prompts)
    estimates = lengths_from_samples(tree, known, 7.0)
    for row, estimate in enumerate(estimates.tolist()):
        if not np.isnan(known[row]):
            assert estimate == known[row]
            continue
        node = int(tree.node_of_row[row])
        samples = np.empty(0)
        while node >= 0 and not len(samples):
            samples = known[tree.rows[tree.first[node] : tree.end[node]]]
            samples = samples[~np.isnan(samples)]
            node = int(tree.parent[node])
        assert estimate == pytest.approx(samples.mean() if len(samples) else 7.0)


def test_one_sample_per_group_of_equal_lengths_gives_the_plan_of_full_knowledge() -> None:
    prompts = branching(20, [(40, 6), (10, 9), (70, 3), (30, 5)])
    group = np.array([prompt[20] for prompt in prompts])
    truth = np.array([3.0, 200.0, 1.0, 90.0])[group - 1]
    is_sampled = np.append(True, group[1:] != group[:-1])
    known = np.where(is_sampled, truth, np.nan)
    estimates = lengths_from_samples(tree_of(prompts), known, 1.0)
    assert estimates.tolist() == truth.tolist()
    plan, full = density(job_of(prompts, estimates)), density(job_of(prompts, truth))
    assert plan.rows.tolist() == full.rows.tolist()
    assert plan.units.size.tolist() == full.units.size.tolist()
