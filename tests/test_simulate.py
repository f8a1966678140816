"""A simulated run asks the length predictor that its EngineSizes name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batchwright.errors import ConfigError
from batchwright.exec.sim import LinearCost
from batchwright.kv.groups import KVGroup
from batchwright.request import Request, SamplingParams
from batchwright.sequence import Sequence
from batchwright.simulate import EngineSizes, Simulation

SIZES = EngineSizes(
    groups=[KVGroup(None, 40)],
    block_size=4,
    max_num_seqs=16,
    max_num_batched_tokens=32,
    max_model_len=64,
)


def run(length_predictor: str) -> Simulation:
    """Rows that may have 48 tokens and have 4, in memory for three of the former."""
    sequences = []
    for row in range(60):
        prompt = np.full(8, 100 + row, np.int32)
        params = SamplingParams(max_tokens=48)
        request = Request(id=str(row), prompt_token_ids=prompt, params=params)
        sequences.append(
            Sequence(
                request=request,
                order=row,
                sample_index=0,
                end_token_ids=(0,),
                noise_key=row,
                max_len=56,
                token_ids=prompt,
            )
        )
    simulation = Simulation(
        iter(sequences),
        replace(SIZES, length_predictor=length_predictor),
        LinearCost(1.0, 0.0, 0.0),
        lambda sequence: 4,
    )
    simulation.run()
    return simulation


def test_the_named_predictor_says_how_many_rows_run_at_once() -> None:
    declared, learning = run("declared"), run("history")
    assert declared.max_running <= 3, "it keeps memory for all that rows allow"
    assert learning.max_running > 6, "it has seen that they end early"
    assert learning.clock.now() < 0.7 * declared.clock.now()


def test_an_unknown_predictor_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no plan.lengths called .best."):
        run("best")
