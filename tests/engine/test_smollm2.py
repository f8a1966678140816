"""SmolLM2: 48 prompts, 64 greedy tokens each, equal to transformers in fp32."""

from __future__ import annotations

import numpy as np
import pytest

from batchwright.llm import LLM
from tests.engine.harness import recorded_logits
from tests.engine.smollm2 import reference_margins, varied_requests

pytestmark = pytest.mark.cpu

TIE = 1e-3
"""Reference margins below this count as ties, and are printed."""


@pytest.fixture(scope="module")
def first_run():
    llm = LLM("smollm2")
    with recorded_logits() as logits:
        results = list(llm.engine.run(varied_requests(llm)))
    return {int(r.request_id): r for r in results}, logits


def test_greedy_tokens_equal_transformers(first_run):
    results, _ = first_run
    assert len(results) == 48
    num_tokens, ties, smallest = 0, [], np.inf
    for index, result in sorted(results.items()):
        assert result.error is None
        output = result.outputs[0]
        assert len(output.token_ids) == 64
        is_choice, margins = reference_margins(result.prompt_token_ids, output.token_ids)
        ties += [(index, int(at), float(margins[at])) for at in np.flatnonzero(margins <= TIE)]
        wrong = ~is_choice & (margins > TIE)
        assert not wrong.any(), f"prompt {index}, token {wrong.argmax()}: {margins[wrong.argmax()]}"
        num_tokens += len(output.token_ids)
        smallest = min(smallest, margins.min())
    print(f"{num_tokens} tokens equal; smallest margin {smallest:.5f}; ties (row, token): {ties}")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 96, "max_num_seqs": 48},
        {"max_num_batched_tokens": 2048, "max_num_seqs": 17, "prefix_sharing": False},
    ],
    ids=["small budget", "few at once, no sharing"],
)
def test_budget_and_batch_limits_change_no_bit(first_run, settings):
    results, logits = first_run
    llm = LLM("smollm2", **settings)
    with recorded_logits() as again:
        for result in llm.engine.run(varied_requests(llm)):
            expected = results[int(result.request_id)].outputs[0].token_ids
            assert result.outputs[0].token_ids == expected
    assert again == logits
